"""The error families, named by who is at fault; each has one consequence.

A peer that hangs up is not an error.
"""


class ConsoleError(Exception):
    """The root of every error raised here on purpose; its text is one clear line."""


class ConfigError(ConsoleError):
    """What the user asked for cannot be had: exit status 2, never restarted."""


class FrontendError(ConsoleError):
    """The frontend broke the vhost-user protocol: its connection is dropped."""


class RefusedError(FrontendError):
    """One message is refused and changes nothing.

    With REPLY_ACK the frontend is told so and its connection lives; without, it is dropped, since
    there is no other way to tell.
    """


class GuestError(ConsoleError):
    """The guest broke a virtqueue: that queue is stopped, everything else lives."""
