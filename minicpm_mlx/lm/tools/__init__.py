"""Functions that a model may call: how it is held to a call, and how calls are read in a reply.

What the prompt says of them is in `text`.
"""
