"""The `fastlm` command. One file for each command; nothing heavy is imported before a command runs."""


def main() -> None:
    from fastlm.cli.app import run

    run()
