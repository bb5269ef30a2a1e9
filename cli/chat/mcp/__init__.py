"""MCP servers of `chat --mcp`: their file, the programs, and what they send."""
