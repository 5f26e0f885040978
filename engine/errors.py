"""What can go wrong, as one clear sentence."""


class BacklineError(Exception):
    """A failure a user can act on; `str(error)` is one sentence. Exit status 1."""

    exit_code = 1


class UsageError(BacklineError):
    """The request itself makes no sense (unknown stem, no track armed, ...). Exit status 2."""

    exit_code = 2


class Cancelled(BacklineError):
    """Raised by a progress callback to stop a job within one denoising step."""
