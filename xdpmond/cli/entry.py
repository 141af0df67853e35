"""Where xdpmonctl begins, before anything is imported that takes time.

Ctrl-C ends it quietly at any moment: also while it still imports its parts, and while the interpreter shuts down.
"""

INTERRUPTED = 130


def main() -> int:
    try:
        from .main import main as run

        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        _leave_the_rest_to_the_system()


def _leave_the_rest_to_the_system() -> None:
    """From here on Ctrl-C just ends the process: what is left to do is the interpreter's, and it would complain."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
