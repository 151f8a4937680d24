"""What ``import ptq`` offers: the calls of the command line, with their choices as arguments.

Models are named as everywhere: a directory, the id of a model on the hub, or ``"demo"``. What
comes back prints as a table and is one in a notebook; its fields are the figures. Mistakes raise
``ValueError`` or an ``OSError`` whose message is one line: what, where, what to do.
"""
