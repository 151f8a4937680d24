"""``python -m ptq``."""

from ptq.cli.commands import main

if __name__ == "__main__":
    main()
