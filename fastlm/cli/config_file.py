"""`--config`: options of a command from a YAML file, below those of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlm.errors import ConfigError


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the command's defaults.

    Raises:
        ConfigError: the file is missing or no mapping, an option is unknown, or PyYAML is not installed.
    """
    if path is None:
        return None
    try:
        import yaml
    except ImportError:
        raise ConfigError("--config reads YAML with the PyYAML package: pip install fastlm[yaml]") from None
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigError(f"{path}: {reason}; give a YAML file of options such as `batch-size: 16`") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no options; give lines such as `batch-size: 16`")
    parameters = {option.removeprefix("--"): p for p in context.command.params for option in p.opts}
    defaults = dict(context.default_map or {})
    for name, value in content.items():
        parameter = parameters.get(str(name).replace("_", "-"))
        if parameter is None or parameter.name is None or str(name) == "config":
            raise ConfigError(f"{path}: {context.command.name} has no option {name}")
        defaults[parameter.name] = value if not parameter.multiple or isinstance(value, list) else [value]
        parameter.required = False  # the file gives it
    context.default_map = defaults
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=read_config, is_eager=True, help="YAML file of options; those given here go first."
    ),
]
