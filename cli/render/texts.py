"""The texts of the interface, in English and in Chinese, looked up by key."""

from __future__ import annotations

import locale
import os
import re

from .command_texts import COMMAND_TEXTS
from .tool_texts import TOOL_TEXTS

LANGUAGES = ("en", "zh")

TEXTS = {
    **COMMAND_TEXTS,
    **TOOL_TEXTS,
    "tuning": (
        "measuring what is fastest on this Mac, once, {seconds:.0f} s at most; Ctrl-C skips it "
        "({variable}=off: never)",
        "正在测量这台 Mac 上最快的设置，仅此一次，最多 {seconds:.0f} 秒；按 Ctrl-C 跳过"
        "（{variable}=off：不再测量）",
    ),
    "tuning_skipped": (
        "skipped; later: minicpm-mlx bench --tune --model {model}",
        "已跳过；以后可运行：minicpm-mlx bench --tune --model {model}",
    ),
    "tuning_failed": (
        "nothing was measured, the defaults are used: {problem}",
        "未能测量，使用默认设置：{problem}",
    ),
    # The chat
    "tips": (
        "/help lists commands · Ctrl-D leaves · Ctrl-C stops · Alt-Enter: new line",
        "/help 列出命令 · Ctrl-D 退出 · Ctrl-C 停止 · Alt-Enter 换行",
    ),
    "waiting": ("⋯ {seconds} s", "⋯ {seconds} 秒"),
    "loading": ("the model is still loading …", "模型仍在加载 …"),
    "bounded": (
        "the conversation is limited to {context} tokens by the free memory",
        "内存所限，对话最多 {context} 个词元",
    ),
    "dense": (
        "beyond {limit:,.0f} tokens this model was published with sparse attention, and here it "
        "attends to everything: at {context:,.0f} tokens to {times:.3g} times as much a token, "
        "with a cache of {gigabytes:.3g} GB",
        "超过 {limit:,.0f} 个词元后，该模型官方采用稀疏注意力，此处仍关注全部内容："
        "到 {context:,.0f} 个词元时，每个词元的注意力计算量为 {times:.3g} 倍，"
        "缓存占 {gigabytes:.3g} GB",
    ),
    "stopped": ("stopped", "已停止"),
    "leave": ("press Ctrl-C again to leave", "再按一次 Ctrl-C 退出"),
    "speed": ("{speed:.1f} tok/s", "{speed:.1f} 词元/秒"),
    "first": ("first after {seconds:.2f} s", "首个 {seconds:.2f} 秒"),
    "context": ("context {used}/{all}", "上下文 {used}/{all}"),
    "memory": ("{size:.1f} {unit}", "{size:.1f} {unit}"),
    "cut": (
        "cut off at {limit} tokens (/set max_tokens)",
        "达到 {limit} 个词元上限，已截断（/set max_tokens）",
    ),
    "thought": ("thought for {seconds:.1f} s, {tokens}", "思考 {seconds:.1f} 秒，{tokens}"),
    "ended_thinking": (
        "the reply ended within its thought: /set max_tokens N lets it go on for longer, /think N "
        "ends the thought after N tokens, /retry asks again",
        "回复在思考阶段就结束了：可用 /set max_tokens N 放宽长度，"
        "或用 /think N 让思考在 N 个词元后结束，再用 /retry 重新回答",
    ),
    "never_answered": (
        "the model ended within its thought: /retry asks again, /think off has it answer at once",
        "模型在思考中就结束了：/retry 重新回答，/think off 让它直接回答",
    ),
    "no_answer": (
        "the reply ended within its thought: raise --max-tokens, or end the thought earlier with "
        "--think-tokens",
        "回复在思考阶段就结束了：可增大 --max-tokens，或用 --think-tokens 让思考提前结束",
    ),
    "no_thoughts": ("there is no thought", "没有思考"),
    "no_such_turn": (
        "expected the number of a turn, 1 to {count}, or all",
        "应为轮次编号（1 到 {count}）或 all",
    ),
    "no_thought": ("the last reply has no thought", "上一条回复没有思考"),
    "no_thinking": (
        "this model does not think before it answers",
        "这个模型不会先思考再回答",
    ),
    "think.on": ("thinking: on", "思考：开"),
    "think.off": ("thinking: off", "思考：关"),
    "think.auto": ("thinking: the model decides", "思考：由模型决定"),
    "think.limit": (", at most {tokens}", "，最多 {tokens}"),
    "full": (
        "the context is full: /undo, /new or /set on_overflow slide",
        "上下文已满：可用 /undo、/new 或 /set on_overflow slide",
    ),
    "full_slides": ("the context is full: /undo or /new", "上下文已满：可用 /undo 或 /new"),
    "alone": (
        "this message alone has {count} tokens, but there is room for {room}",
        "仅这条消息就有 {count} 个词元，而空间只有 {room} 个",
    ),
    "long_system": (
        "the system prompt has {system} tokens and with this message {count}, but there is room "
        "for {room}; /system sets a shorter one, /system off none",
        "系统提示有 {system} 个词元，加上这条消息共 {count} 个，而空间只有 {room} 个；"
        "可用 /system 换成较短的提示，或用 /system off 取消",
    ),
    "drop": ("/attach off removes the attached files", "/attach off 可取消待发的文件"),
    "filled": (
        "cut off: the context is full; the oldest turns will make room for the next one",
        "上下文已满，已截断；下一轮会让最早的对话让出空间",
    ),
    "slid": (
        "the {count} oldest messages no longer fit; the model does not see them",
        "最早的 {count} 条消息放不下，模型已看不到",
    ),
    "cleared": ("conversation cleared", "对话已清空"),
    "new": ("a new conversation", "新的对话"),
    "saved": ("saved as {name}", "已保存为 {name}"),
    "exported": ("written to {path}", "已写入 {path}"),
    "exists": (
        "{name} exists already; /save -f {typed} replaces it",
        "{name} 已存在；/save -f {typed} 会覆盖它",
    ),
    "document": (
        "{name}: a document must be FILE.md; a session's name has no such ending",
        "{name}：文档应为 FILE.md；会话名不能有这样的后缀",
    ),
    "elsewhere": (
        "{name} was changed by another program; this conversation is now saved as {new}",
        "{name} 已被其他程序修改；本对话改存为 {new}",
    ),
    "unsaved": ("not saved: {error}", "未保存：{error}"),
    "resumed": ("{name}: {messages}", "{name}：{messages}"),
    "rereads": ("the next turn reads it again", "下一轮会重新读取全部内容"),
    "other": (
        "it was held with {model}; the next turn reads it again with this model",
        "此前使用的模型是 {model}；现在的模型会在下一轮重新读取",
    ),
    "none": ("no saved sessions yet", "还没有保存的会话"),
    "kept": (
        "KV caches: {used} of at most {limit}; those used longest ago make room",
        "键值缓存：{used}，最多 {limit}；最久未用的先删除",
    ),
    "is_open": (
        "{name} is this conversation; /new begins another, then it can be deleted",
        "{name} 是当前对话；先用 /new 新建对话，再删除它",
    ),
    "deleted": ("{name} deleted, {size}", "已删除 {name}，{size}"),
    "undone": ("taken back: {text}", "已撤回：{text}"),
    "copied": ("copied", "已复制"),
    "nothing": ("there is no reply yet", "还没有回复"),
    "no_turn": ("there is no turn yet", "还没有对话"),
    "more": ("… and {count} more", "… 另有 {count} 个"),
    "attached": (
        "{name}: {tokens}, sent with your next message",
        "{name}：{tokens}，随下一条消息发送",
    ),
    "no_files": ("no file is attached; use /attach FILE", "没有待发的文件；可用 /attach FILE"),
    "dropped": ("no file is attached any more", "已取消所有附件"),
    "waits": ("{name} is attached already", "{name} 已附上"),
    "empty": ("{path}: the file is empty; not attached", "{path}：空文件；未附上"),
    "too_long": (
        "{path} does not fit: about {count} tokens, but there is room for {room}; not attached",
        "{path} 放不下：约 {count} 个词元，只剩 {room} 个的空间；未附上",
    ),
    "binary": ("{path}: not a text file in UTF-8", "{path}：不是 UTF-8 文本文件"),
    "no_file": ("{path}: not a file", "{path}：不是文件"),
    "failed": ("{path}: {reason}", "{path}：{reason}"),
    "system": ("system prompt: {text}", "系统提示：{text}"),
    "no_system": ("no system prompt", "没有系统提示"),
    "base": (
        "model: {model}, the base of {adapter} (--model takes another)",
        "模型：{model}，即 {adapter} 的基座（可用 --model 另选）",
    ),
    "adapter": ("adapter: {path}", "适配器：{path}"),
    "no_adapter": ("no adapter", "没有适配器"),
    "no_longer": ("its adapter cannot be applied: {error}", "它的适配器无法使用：{error}"),
    "set": ("{name} = {value}", "{name} = {value}"),
    "no_setting": ("no setting {name}; the settings are {names}", "没有设置 {name}；可用：{names}"),
    "whole": ("{name} must be a whole number, got {value}", "{name} 应为整数，而不是 {value}"),
    "number": ("{name} must be a number, got {value}", "{name} 应为数字，而不是 {value}"),
    "stop": (
        '{name} takes one text, or several in quotes: "a" "b"; none removes it, got {value}',
        '{name} 应为一段文本，或带引号的多段文本："a" "b"；none 取消；而不是 {value}',
    ),
    "logit_bias": (
        '{name} takes token ids with numbers: {{"5": -1.5}}; none removes it, got {value}',
        '{name} 应为词元编号及其数值：{{"5": -1.5}}；none 取消；而不是 {value}',
    ),
    "model": ("model: {model}", "当前模型：{model}"),
    "keeps": ("your settings stay: {settings}", "保留您的设置：{settings}"),
    "without_adapter": (
        "without the adapter {path}, which was made for the other model",
        "不再使用适配器 {path}：它属于之前的模型",
    ),
    "without_draft": (
        "without the draft model, which belongs to the other model",
        "不再使用草稿模型：它属于之前的模型",
    ),
    "unknown": ("no command {name}; /help lists them", "没有命令 {name}；/help 列出全部"),
    "usage": ("usage: {usage}", "用法：{usage}"),
    "absent": (
        "{model} is not on this disk. The download is {gb} GB, once.",
        "{model} 还不在本机上。需要下载 {gb} GB，只需一次。",
    ),
    "fits": (
        "It fits: {memory} GB of memory, {free} GB are free. To expect here: about {speed} tok/s.",
        "内存够用：需要 {memory} GB，空闲 {free} GB。本机预计每秒约 {speed} 个词元。",
    ),
    "too_big": (
        "It does not fit: it takes {memory} GB of memory, and {free} GB are free.",
        "内存不足：需要 {memory} GB，空闲 {free} GB。",
    ),
    "offer": (
        "[d] download it, [t] try the demo model instead (small, not MiniCPM), [q] quit: ",
        "[d] 下载，[t] 先试用 demo 模型（很小，不是 MiniCPM），[q] 退出：",
    ),
    # The list of models, where a chat names none
    "none_here": (
        "no model is on this disk; `minicpm-mlx pull NAME` downloads one, `list` shows the names",
        "本机还没有模型；`minicpm-mlx pull 名称` 下载一个，`list` 列出名称",
    ),
    "pick.title": (
        "Which model? It is downloaded once.",
        "请选择模型，只需下载一次。",
    ),
    "pick.model": ("model", "模型"),
    "pick.download": ("download", "下载"),
    "pick.memory": ("memory", "内存"),
    "pick.speed": ("speed", "速度"),
    "pick.languages": ("languages", "语言"),
    "pick.here": ("here", "已在本机"),
    "pick.fits": ("{memory} GB, fits", "{memory} GB，够用"),
    "pick.too_big": ("{memory} GB, too big", "{memory} GB，不够"),
    "pick.tps": ("{speed} tok/s", "{speed} 词元/秒"),
    "pick.keys": (
        "arrows, digits; Enter takes, q leaves",
        "上下键或数字选择，Enter 确定，q 退出",
    ),
    "pick.number": (
        "1 to {count}, Enter for {default}, q to quit: ",
        "输入 1 到 {count}，回车选 {default}，q 退出：",
    ),
    "total": (
        "{turns}, {tokens}, {speed:.1f} tok/s on average, {each:.1f} tokens a pass",
        "{turns}，{tokens}，平均 {speed:.1f} 词元/秒，每次前向 {each:.1f} 个词元",
    ),
    "cache": ("cache: {used}, {mb:.0f} MB{bits}", "缓存：{used}，{mb:.0f} MB{bits}"),
    "in_bits": (
        ", in {bits} bits (on the demo: perplexity {loss}, {share} % of 16 bits)",
        "，{bits} 位（demo 实测：困惑度 {loss}，占 16 位的 {share} %）",
    ),
    # A training run
    "train.step": ("step {step}/{steps}", "步 {step}/{steps}"),
    "train.left": ("{time} left", "剩余 {time}"),
    "train.loss": ("loss {loss:#.4g}", "损失 {loss:#.4g}"),
    "train.valid": ("valid loss {loss:#.4g}", "验证损失 {loss:#.4g}"),
    "train.is_best": (" (best)", "（最佳）"),
    "train.not_best": (" (best {best:#.4g})", "（最佳 {best:#.4g}）"),
    "train.rate": ("lr {rate:.1e}", "学习率 {rate:.1e}"),
    "train.speed": ("{speed:.0f} tok/s", "{speed:.0f} 词元/秒"),
    "train.epoch": ("epoch {epoch:.2f}", "轮次 {epoch:.2f}"),
    "train.saved": ("saved {folder}", "已保存 {folder}"),
    "train.prompt": ("prompt", "提示"),
    "train.before": ("before", "训练前"),
    "train.after": ("after", "训练后"),
    "train.best": (
        "best validation loss {loss:.4f}, at step {step}",
        "最佳验证损失 {loss:.4f}（第 {step} 步）",
    ),
    "train.no_better": (
        "no validation loss fell below that before training, {loss:.4f}: the last step is kept",
        "验证损失始终不低于训练前的 {loss:.4f}，保留最后一步",
    ),
    "train.not_validated": (
        "stopped before a validation, the last step is kept; loss before training {loss:.4f}",
        "在验证之前停止，保留最后一步；训练前的损失为 {loss:.4f}",
    ),
    "train.test": ("test {name} {value:.4f}", "测试集 {name} {value:.4f}"),
    "train.curve": ("loss curve: {path}", "损失曲线：{path}"),
    "train.resume": (
        "the same command with --resume continues the run",
        "加上 --resume 再次运行同一命令即可继续",
    ),
    "train.chat": ("to chat with the result:", "与训练结果对话："),
    # The server
    "serve.ready": (
        "{name} is served at {url} (Ctrl-C stops it)",
        "{name} 已启动：{url}（Ctrl-C 结束）",
    ),
    "serve.adapters": ("with adapters, by name: {names}", "适配器（按名称使用）：{names}"),
    "serve.page": ("to chat in a browser: {url}", "在浏览器中聊天：{url}"),
    "serve.key": ("every route requires an API key", "所有接口都需要 API 密钥"),
    "serve.readable": (
        "other users of this machine can read {file}; `chmod 600 {file}` keeps it private",
        "本机其他用户可以读取 {file}；运行 `chmod 600 {file}` 可设为私有",
    ),
    "serve.plain": (
        "other machines' requests come unencrypted; --tls-cert and --tls-key encrypt them",
        "来自其他机器的请求未加密；可用 --tls-cert 和 --tls-key 加密",
    ),
    "connect.install": (
        "no program `{program}` is found here; it is installed with `{command}`",
        "这里没有 `{program}` 程序；安装命令：`{command}`",
    ),
    "connect.proxy": (
        "this shell sends requests through a proxy, those for {host} as well; before the client "
        'starts: export NO_PROXY="{host},$NO_PROXY"',
        "当前 shell 的请求都经过代理，对 {host} 的也一样；启动客户端前先 "
        'export NO_PROXY="{host},$NO_PROXY"',
    ),
    "connect.unanswered": (
        "no server answers at {url}: {model} and a context of {context:,} tokens are assumed",
        "{url} 没有服务器应答：按模型 {model}、上下文 {context:,} 个词元处理",
    ),
    "serve.ending": (
        "shutting down: replies have {seconds:g} s to finish; a second Ctrl-C stops at once",
        "正在结束：回复还有 {seconds:g} 秒完成；再按一次 Ctrl-C 立即结束",
    ),
}

LANGUAGE_NAMES = {"en": ("English", "英文"), "zh": ("Chinese", "中文")}

COUNTED = {
    "line": ("line", "lines", "行"),
    "message": ("message", "messages", "条消息"),
    "reply": ("reply", "replies", "次回复"),
    "token": ("token", "tokens", "个词元"),
}
"""One, several, and Chinese."""


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NO_TEXT = re.compile(r"[\ud800-\udfff]")
"""Bytes of a file name that are no UTF-8, as Python decodes them; printing them would fail."""


def printable(text: str) -> str:
    """The text without what a terminal would obey or could not show."""
    return CONTROLS.sub("", NO_TEXT.sub("\ufffd", text))


def size_text(count: int) -> str:
    """Bytes in decimal units: "1.5 GB", "12 kB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count // size} {unit}"
            )
    return f"{count} B"


def gigabytes(size: int) -> str:
    """A download's size in 10⁹ bytes, as `list` shows it; of a tiny one its first digits."""
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"


class Texts:
    """Looks texts up in one language, by default that of the locale."""

    def __init__(self, language: str | None = None) -> None:
        self.language = language or _locale_language()

    def __call__(self, key: str, **values: object) -> str:
        return self.pick(*TEXTS[key]).format(**values)

    def count(self, noun: str, number: int) -> str:
        """A number with its noun: "1 reply", "2 replies"."""
        one, several, chinese = COUNTED[noun]
        return f"{number} {self.pick(one if number == 1 else several, chinese)}"

    def thought(self, seconds: float, tokens: int) -> str:
        """The line in place of a thought."""
        return self("thought", seconds=seconds, tokens=self.count("token", tokens))

    def language_name(self, code: str) -> str:
        """The name of a language of a model; the code of one without a name here."""
        return self.pick(*LANGUAGE_NAMES.get(code, (code, code)))

    def pick(self, english: str, chinese: str) -> str:
        return chinese if self.language == "zh" and chinese else english


def _locale_language() -> str:
    variables = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    name = next(filter(None, variables), None) or locale.getlocale()[0] or ""
    return "zh" if name.lower().startswith("zh") else "en"
