"""``python -m llamafactory_sekd COMMAND …``: the host's commands with the plug-in applied explicitly."""

from llamafactory_sekd.cli import host_main


if __name__ == "__main__":
    host_main()
