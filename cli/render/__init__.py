"""Theme, Markdown, spinner and interface texts of the terminal, for the rest of cli."""
