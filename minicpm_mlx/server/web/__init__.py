"""A chat page in the browser, served by the same server."""
