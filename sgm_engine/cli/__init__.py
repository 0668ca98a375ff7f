"""The command ``sgm``: one file a command; arguments.py and console.py import none of them, main.py imports all."""
