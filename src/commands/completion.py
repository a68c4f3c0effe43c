"""Completion in shells; in bash where words have colons, too, as GUEST:PORT.

For bash a colon ends a word, and what it is given replaces only what follows the last one. So the
line is looked at instead of bash's words, and what it has already is not given again.
"""

from __future__ import annotations

import json
import os

import click
from click.shell_completion import (
    BashComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from . import NAME
from .options import json_option

_SOURCE = """\
%(complete_func)s() {
    local IFS=$'\\n' line word had="" kind value
    line="${COMP_LINE:0:COMP_POINT}"
    word="${line##*[[:space:]]}"
    if [[ $COMP_WORDBREAKS == *:* && $word == *:* ]]; then
        had="${word%%:*}:"
    fi
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$had"}") ;;
        esac
    done < <(env COMP_WORDS="$line" %(complete_var)s=bash_complete "$1")
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class Bash(BashComplete):
    """Completion for bash from the whole line up to the cursor."""

    source_template = _SOURCE

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is begun, and that one."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)[1:]
        begun = "" if line[-1:].isspace() or not words else words.pop()
        return words, begun


@click.command(
    epilog="For bash, source it; for zsh, too; for fish, put it in its completions folder."
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
def completion(shell: str, as_json: bool) -> None:
    """Print the script that completes commands, options, guests and ports in SHELL.

    \b
    eval "$(vhost-device-console completion bash)"
    vhost-device-console completion zsh >~/.zfunc/_vhost-device-console
    vhost-device-console completion fish >~/.config/fish/completions/vhost-device-console.fish
    """
    from .daemon import daemon  # whose options are completed, too

    variable = f"_{NAME}_COMPLETE".replace("-", "_").upper()
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click has all three
    script = kind(daemon, {}, NAME, variable).source()
    click.echo(json.dumps({"shell": shell, "script": script}) if as_json else script)
