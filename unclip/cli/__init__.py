"""The command `unclip`. Results go to stdout, everything else to stderr; a user's mistake is one line and exit code 2."""

import logging
import sys
from typing import Annotated, Any

import typer

from .clip import classify, search
from .convert import kandinsky_prior, karlo
from .data import bank, emoji, phrases
from .embed import embed
from .evaluate import evaluate
from .generate import generate, rerank
from .images import install_hint
from .inspect import inspect
from .latent import edit, inpaint, interpolate, outpaint, pca, variations
from .plan import plan
from .plot import plot
from .push import push
from .serve import serve
from .studio import app as studio
from .train import export, train

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Build datasets.")
convert_app = typer.Typer(no_args_is_help=True, help="Convert other systems' checkpoints to this package's layout.")
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")

# The base class of the parser's errors; typer has its own parser or uses click's, depending on its version.
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> None:
    """Run the command line; a user's mistake is reported without a traceback."""
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("xformers").setLevel(logging.ERROR)  # imported by diffusers, it warns on machines without a GPU
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # without arguments: print the help
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(error.format_message() + _value_of(getattr(error, "param", None)))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        _fail(str(error))
    except (FloatingPointError, OSError, MemoryError) as error:  # not a mistake of the command line, such as a full disk
        _fail(str(error) or "out of memory", code=1)
    except ModuleNotFoundError as error:
        if (hint := install_hint(error.name)) is None:
            raise
        _fail(hint)
    except RuntimeError as error:
        if not _report(error):
            raise
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _report(error: RuntimeError) -> bool:
    """Exit with a message for out of memory and for short errors; returns False for one that needs its traceback."""
    from ..runtime.memory import out_of_memory

    if out_of_memory(error):
        hint = "a smaller batch_size, or for training gradient_checkpointing=true, takes less"
        _fail(f"{str(error).splitlines()[0]} ({hint})", code=1)
    if type(error) is not RuntimeError or str(error).count("\n") > 2:
        return False
    _fail(str(error))
    return True


def _value_of(parameter: Any) -> str:
    """The value of an option, for an error message that does not name it."""
    words = sys.argv[1:]
    for name in getattr(parameter, "opts", ()):
        if name in words[:-1]:
            return f", got {words[words.index(name) + 1]!r}"
    return ""


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text to image with unCLIP (DALL·E 2's design)."""


sampling = (generate, rerank, variations, interpolate, edit, inpaint, outpaint, pca, classify, search)
for command in (*sampling, embed, serve, evaluate, plan, train, plot, export, push, inspect):
    app.command()(command)
app.command("app")(studio)
convert_app.command()(karlo)
convert_app.command("kandinsky-prior")(kandinsky_prior)
data_app.command()(emoji)
data_app.command()(phrases)
data_app.command()(bank)
