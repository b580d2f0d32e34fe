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
