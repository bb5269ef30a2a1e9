"""What the chat says of tools, in English and in Chinese."""

TOOL_TEXTS = {
    "argument_cut": ("{start} … ({count} characters)", "{start} …（共 {count} 个字符）"),
    "allow": (
        "run it? [y]es · [a]lways this tool · [n]o:",
        "运行吗？[y] 是 · [a] 始终允许此工具 · [n] 否：",
    ),
    "allow_or_view": (
        "run it? [y]es · [a]lways this tool · [n]o · [v]iew it whole:",
        "运行吗？[y] 是 · [a] 始终允许此工具 · [n] 否 · [v] 查看完整内容：",
    ),
    "not_allowed": ("not run", "未运行"),
    "nobody_asked": (
        "not run: nobody can be asked; --allow-tool {name} allows it",
        "未运行：无法询问；可用 --allow-tool {name} 允许",
    ),
    "more_lines": (" … {lines} more", " … 另有 {lines}"),
    "many_calls": (
        "stopped: {count} rounds of calls and no answer yet; any message lets it go on, "
        "/set max_rounds N allows more",
        "已停止：连续调用了 {count} 轮工具仍没有回答；发送任意消息可让它继续，"
        "/set max_rounds N 可放宽上限",
    ),
    "many_calls_asked": (
        "stopped: {count} rounds of calls and no answer yet; --max-rounds N allows more",
        "已停止：连续调用了 {count} 轮工具仍没有回答；--max-rounds N 可放宽上限",
    ),
    "too_many_tools": (
        "without tools: their descriptions take {count} tokens, and the context has {all}; fewer "
        "servers leave room",
        "不使用工具：工具说明需要 {count} 个词元，而上下文只有 {all} 个；可减少服务器",
    ),
    "no_tools": ("without tools: {error}", "不使用工具：{error}"),
    "no_tool": (
        "there are no tools; chat --mcp FILE starts some",
        "没有工具；可用 chat --mcp FILE 启动",
    ),
    "not_offered": (
        "this model is offered no tools",
        "没有向这个模型提供工具",
    ),
    "no_such_tool": ("no tool has {text} in its name", "没有名称含 {text} 的工具"),
    "more_tools": (
        "… and {count} more; /tools TEXT lists those with TEXT in their name",
        "… 另有 {count} 个；/tools TEXT 只列出名称含 TEXT 的工具",
    ),
    "tools_end": ("✓ runs without being asked", "✓ 表示无需询问即可运行"),
    "many_tools": (
        "the tools' descriptions take {count} of the context's {all} tokens; fewer servers leave "
        "more room",
        "工具说明占用上下文 {all} 个词元中的 {count} 个；减少服务器可腾出空间",
    ),
    "server_problem": ("tools: {problem}", "工具：{problem}"),
    "starting_tools": ("starting tools …", "正在启动工具 …"),
}
