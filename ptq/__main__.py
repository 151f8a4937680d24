"""``python -m ptq``."""

from ptq.cli import main

if __name__ == "__main__":
    main()
