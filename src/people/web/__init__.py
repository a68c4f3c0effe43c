"""The page: consoles in a browser. A process of its own, which speaks the monitor protocol."""
