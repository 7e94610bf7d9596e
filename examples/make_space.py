"""Creates a folder for a Hub Space that includes the package, as long as it is not on a package index.

    python examples/make_space.py dist/pgseg_hf-0.1.0-py3-none-any.whl dist/space

A Space installs `requirements.txt` before its other files are available, so a wheel cannot be listed there. The wheel
is unpacked next to the demo instead, and its dependencies are listed.
"""

import argparse
import re
import shutil
import zipfile
from pathlib import Path

DEMO = Path(__file__).parent.parent / "demo"
# The dependencies of every installation and those of the extra.
_NEEDED = re.compile(r"^Requires-Dist: ([^;\n]+?)(?:; extra == ['\"]demo['\"])?$", re.MULTILINE)


def make_space(wheel: Path, folder: Path) -> None:
    """Fills a new folder.

    Raises:
        FileExistsError: the folder already exists.
    """
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    (metadata,) = folder.glob("*.dist-info/METADATA")
    needed = _NEEDED.findall(metadata.read_text(encoding="utf-8"))
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    make_space(args.wheel, args.folder)
    print(
        f"{args.folder}: upload it as a Space, for example with `hf upload OWNER/NAME {args.folder} --type space`"
    )


if __name__ == "__main__":
    main()
