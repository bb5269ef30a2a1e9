"""A line on each of the chat's slash commands, in English and in Chinese."""

COMMAND_TEXTS = {
    "/help": ("this list", "显示本列表"),
    "/?": ("this list", "显示本列表"),
    "/system": ("set the system prompt", "设置系统提示"),
    "/set": ("change a setting", "修改设置"),
    "/show": ("model and settings", "模型与设置"),
    "/save": (
        "save, or export as Markdown; -t with thoughts, -f replaces",
        "保存或导出为 Markdown；-t 含思考，-f 覆盖",
    ),
    "/load": ("resume a saved session", "继续指定的会话"),
    "/sessions": ("list saved sessions, or delete one", "列出或删除已保存的会话"),
    "/resume": ("resume the last session", "继续上一个会话"),
    "/new": ("start a new conversation, keeping this one", "新建对话，保留当前"),
    "/undo": ("take back the last turn", "撤回上一轮"),
    "/retry": ("answer the last question again", "重新回答"),
    "/edit": ("change the last question", "修改上一个问题"),
    "/copy": ("copy the last reply to the clipboard", "复制上一条回复"),
    "/think": (
        "think before answering, at most N tokens; auto: the model decides",
        "回答前先思考，最多 N 个词元；auto：由模型决定",
    ),
    "/thoughts": (
        "show the last turn's thoughts, turn N's, or all",
        "显示上一轮、第 N 轮或全部的思考",
    ),
    "/tools": (
        "list the tools of --mcp, or those with TEXT in their name",
        "列出 --mcp 提供的工具，或名称含 TEXT 的工具",
    ),
    "/attach": ("attach a text file", "附上文本文件"),
    "/model": ("switch to another model", "换用其他模型"),
    "/adapter": ("apply a LoRA adapter", "换用 LoRA 适配器"),
    "/stats": ("speed and memory so far", "速度与内存统计"),
    "/tokens": ("count tokens", "统计词元"),
    "/clear": ("forget the turns", "清空对话"),
    "/exit": ("leave", "退出"),
    "/quit": ("leave", "退出"),
    "/bye": ("leave", "退出"),
}
