"""A vhost-user backend for the virtio console.

One idea carries it: a console is a journal with a keyboard. See ARCHITECTURE.md.
"""

__version__ = "0.1.0"
