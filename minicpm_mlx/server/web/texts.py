"""Texts of the page in English and in Chinese."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    "message": ("Message", "消息"),
    "hint": (
        "Ask something. Enter sends, Shift+Enter starts a new line.",
        "输入消息。Enter 发送，Shift+Enter 换行。",
    ),
    "submit": ("Submit", "发送"),
    "stop": ("Stop", "停止"),
    "regenerate": ("Regenerate", "重新生成"),
    "undo": ("Undo", "撤回"),
    "clear": ("Clear", "清空"),
    "adapter": ("Adapter", "适配器"),
    "system": ("System text", "系统提示"),
    "system_hint": ("Instructions for the model", "给模型的指示"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_hint": (
        "Sample from the likeliest tokens with this total probability.",
        "只从累计概率达到此值的词元中采样。",
    ),
    "temperature": ("Temperature", "温度"),
    "temperature_hint": ("0 always takes the likeliest token.", "0 表示总取最可能的词元。"),
    "max_tokens": ("Max tokens", "最大词元数"),
    "max_tokens_hint": ("Length of a reply, at most.", "回复的最大长度。"),
    "think": ("Thinking", "思考"),
    "think_hint": ("Whether the model thinks before it answers.", "模型是否先思考再回答。"),
    "think_auto": ("automatic", "自动"),
    "think_on": ("on", "开"),
    "think_off": ("off", "关"),
    "think_tokens": ("Longest thought", "思考长度"),
    "think_tokens_hint": ("In tokens; at the right end, no limit.", "以词元计；拉到最右则不限。"),
    "thinking": ("thinking …", "思考中 …"),
    "thought": (
        "thought for {seconds:.1f} s, {tokens} tokens",
        "思考 {seconds:.1f} 秒，{tokens} 个词元",
    ),
    "ended_thinking": (
        "the reply ended within its thought: raise Max tokens, lower Longest thought, or set "
        "Thinking to off",
        "回复在思考阶段就结束了：请增大“最大词元数”、减小“思考长度”，或将“思考”设为“关”",
    ),
    "export": ("Export as Markdown", "导出为 Markdown"),
    "with_thoughts": ("with thoughts", "包含思考"),
    "you": ("You", "你"),
    "a_thought": ("thought", "思考"),
    "waiting": ("waiting …", "等待中 …"),
    "stopped": ("stopped", "已停止"),
    "tokens": ("{count} tokens", "{count} 个词元"),
    "one_token": ("1 token", "1 个词元"),
    "first": ("first after {seconds:.2f} s", "首个 {seconds:.2f} 秒"),
    "speed": ("{speed:.1f} tokens/s", "{speed:.1f} 词元/秒"),
    "cached": (
        "{cached} of {prompt} prompt tokens cached",
        "提示 {prompt} 个词元，其中 {cached} 个来自缓存",
    ),
    "cut": ("cut off: see Max tokens", "已截断：见“最大词元数”"),
    "too_long": (
        "System text and conversation are longer than the model's {context} tokens. Shorten the "
        "text, or use Undo or Clear.",
        "系统提示与对话超出了模型的 {context} 个词元。请缩短文本，或撤回、清空。",
    ),
    "full": (
        "The server is busy and its queue is full. Try again in a moment.",
        "服务器繁忙，队列已满。请稍后再试。",
    ),
    "late": (
        "The reply took longer than the server allows. Try again, or ask for fewer tokens.",
        "回复超过了服务器允许的时间。请重试，或减少最大词元数。",
    ),
    "closing": ("The server is shutting down.", "服务器正在关闭。"),
    "failed": ("No reply: {reason}", "无法回复：{reason}"),
    "unexpected": ("The server failed; see its log.", "服务器出错，详情见其日志。"),
}


def say(key: str, language: str, **values: object) -> str:
    """A text in "en" or "zh"; any other language is English."""
    return TEXTS[key][language == "zh"].format(**values)


def preferred(accept_language: str) -> str:
    """The language for an Accept-Language header; the first one decides."""
    return "zh" if accept_language.strip().lower().startswith("zh") else "en"
