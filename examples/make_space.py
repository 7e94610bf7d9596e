"""Makes a folder for a Space of the Hub that carries the package, for as long as it is on no index.

    python examples/make_space.py dist/pgseg_hf-0.1.0-py3-none-any.whl dist/space

A Space installs `requirements.txt` before its other files are there, so that it cannot name a wheel among them: the
wheel is unpacked beside the demo, and what it needs is required instead.
"""

import argparse
import re
import shutil
import zipfile
from pathlib import Path

DEMO = Path(__file__).parent.parent / "demo"
# What every installation needs, and what the extra adds.
_NEEDED = re.compile(r"^Requires-Dist: ([^;\n]+?)(?:; extra == ['\"]demo['\"])?$", re.MULTILINE)


def make_space(wheel: Path, folder: Path) -> None:
    """Fills a new folder.

    Raises:
        FileExistsError: it is there already.
    """
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    (metadata,) = folder.glob("*.dist-info/METADATA")
    needed = _NEEDED.findall(metadata.read_text(encoding="utf-8"))
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")


def main() -> None:
    """Makes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    make_space(args.wheel, args.folder)
    print(
        f"{args.folder}: upload it as a Space, for instance by `hf upload OWNER/NAME {args.folder} --type space`"
    )


if __name__ == "__main__":
    main()
