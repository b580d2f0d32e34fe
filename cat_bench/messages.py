"""What a person at the terminal reads beside the results: progress, warnings, errors, on stderr."""

import typer


def say(text: str) -> None:
    """To stderr: stdout carries results and nothing else."""
    typer.echo(text, err=True)


def warn(text: str) -> None:
    say(f"warning: {text}")


def plural(count: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
