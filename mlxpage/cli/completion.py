"""`mlxpage completion`: what makes a shell complete the words of a command."""

from __future__ import annotations

import sys

import click
from click import shell_completion

from mlxpage.cli.output import say

_INSTALL = {
    "bash": 'put  eval "$(mlxpage completion bash)"  into ~/.bashrc; it takes bash 4.4',
    "zsh": 'put  eval "$(mlxpage completion zsh)"  into ~/.zshrc, below compinit',
    "fish": "run  mlxpage completion fish > ~/.config/fish/completions/mlxpage.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_INSTALL)), metavar="SHELL")
@click.pass_context
def command(context, shell):
    """Print what makes SHELL complete commands, options and models.

    \b
    bash  eval "$(mlxpage completion bash)"    in ~/.bashrc; bash 4.4 and newer
    zsh   eval "$(mlxpage completion zsh)"     in ~/.zshrc, below compinit
    fish  mlxpage completion fish > ~/.config/fish/completions/mlxpage.fish
    """
    made_by = shell_completion.get_completion_class(shell)
    script = made_by(context.find_root().command, {}, "mlxpage", "_MLXPAGE_COMPLETE")
    click.echo(script.source_template % script.source_vars())
    if sys.stdout.isatty():
        say(_INSTALL[shell], dim=True)
