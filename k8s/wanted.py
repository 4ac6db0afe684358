"""Prints what the service needs to run, one requirement a line: the image installs it before the code is copied."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
print(*project["dependencies"], *project["optional-dependencies"]["serve"], sep="\n")
