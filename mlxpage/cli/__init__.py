"""The command line: answers and JSON on stdout, everything for people on stderr.

Each command is a module of its own, imported when it is asked for.
"""
