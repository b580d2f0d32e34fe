"""The one error that users see without a traceback."""


class UserError(Exception):
    """Bad input: what was wrong, what was got, what was expected; `hint` says what to do.

    Raised anywhere, caught once in the CLI, printed as `error: ...` and exit code 2.
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n       {self.hint}" if self.hint else self.message


def require_cuda(what: str, device_type: str) -> None:
    """Raises UserError unless `device_type` is "cuda"."""
    if device_type != "cuda":
        raise UserError(f"{what} needs a CUDA GPU, got {device_type}.", "Use --forward-path eager.")
