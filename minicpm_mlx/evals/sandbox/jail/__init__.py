"""The sandbox's process: it locks itself in, then runs a program that a model wrote.

The process loads these files alone and not the library, so they import only each other and Python's
own modules.
"""
