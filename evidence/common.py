"""What the scripts beside this one share: asga.py on the path, and how they end."""
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asga  # noqa: E402


def settings_of(cfg):
    """The asga.SearchSettings of a parsed command line."""
    names = [field.name for field in dataclasses.fields(asga.SearchSettings)]
    return asga.SearchSettings(**{name: getattr(cfg, name) for name in names})

def run(main):
    """Exit with what main() returns; with 2 and a line for what a user can mend."""
    try:
        sys.exit(main())
    except (asga.AsgaError, OSError) as error:
        asga.say(f"error: {asga.one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt as stop:
        asga.say(f"{str(stop) or 'stopped'}; the same command goes on")
        sys.exit(130)
