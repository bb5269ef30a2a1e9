"""Sentences about clients for the person who sets one up, in English and in Chinese."""

from __future__ import annotations

from .server_address import ID, KEY_VARIABLE, ServerAddress

Note = tuple[str, str]
"""English and Chinese."""
NONE: Note = ("", "")
SHORTEST_FOR_AGENTS = 16_384
"""Tokens of context below which an agent's instructions leave no room for work."""


def own_file(command: str) -> Note:
    """Where plain `command` does not read the file."""
    return (
        f"a file of its own: plain `{command}` stays as it is",
        f"单独的文件：不带选项的 `{command}` 一切照旧",
    )


def continue_key(at: ServerAddress) -> Note:
    """Where Continue reads a key."""
    if at.key is not None or not at.key_variable:
        return NONE
    return (
        f"{at.key_variable} is read from ~/.continue/.env",
        f"{at.key_variable} 从 ~/.continue/.env 读取",
    )


def derived_key(at: ServerAddress) -> Note:
    """Where the client takes the variable's name from its own name for the server."""
    if at.key is not None:
        return (
            f"the key is not in the file: export {KEY_VARIABLE} before it starts",
            f"密钥不在文件里：启动前先 export {KEY_VARIABLE}",
        )
    if at.key_variable is None:
        return (
            f"it wants some key: export {KEY_VARIABLE}=none before it starts",
            f"它非要密钥不可：启动前先 export {KEY_VARIABLE}=none",
        )
    if at.key_variable == KEY_VARIABLE:
        return (f"it reads the key from {KEY_VARIABLE}", f"密钥从 {KEY_VARIABLE} 读取")
    return (
        f'it reads the key from one name alone: export {KEY_VARIABLE}="${at.key_variable}"',
        f'它只从一个变量读取密钥：export {KEY_VARIABLE}="${at.key_variable}"',
    )


def aichat_key(at: ServerAddress) -> Note:
    """Where aichat reads a key that is not in its file."""
    return derived_key(at) if at.key is None and at.key_variable else NONE


def open_webui(at: ServerAddress) -> Note:
    """When Open WebUI reads its variables."""
    return (
        "only its first start reads these; later: Admin Panel > Settings > Connections",
        "只有第一次启动会读取；以后在 Admin Panel > Settings > Connections 里修改",
    )


def llm_key(at: ServerAddress) -> Note:
    """How llm is given a key."""
    if not (at.key or at.key_variable):
        return NONE
    value = "KEY" if at.key else f'"${at.key_variable}"'
    command = f"llm keys set {ID} --value {value}"
    return (f"it keeps keys itself: {command}", f"它自己保存密钥：{command}")


def short_context(at: ServerAddress) -> Note:
    """Whether an agent's instructions have room in the model's context."""
    if at.context is None or at.context >= SHORTEST_FOR_AGENTS:
        return NONE
    return (
        f"{at.model} has a context of {at.context:,} tokens; the instructions of an agent alone "
        "take 5,000 to 20,000, so take a model with a longer one, such as minicpm5-1b",
        f"{at.model} 的上下文只有 {at.context:,} 个词元；智能体的说明就要 5,000 到 20,000 个，"
        "请换上下文更长的模型，例如 minicpm5-1b",
    )
