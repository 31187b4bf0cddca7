#!/bin/sh
# Installs $TORCH first and alone, so that no dependency pulls a build for another machine.
# $INDEX is asked when it answers within $TIMEOUT_S; else pip uses what it is configured with.
set -eu
# An installed local version such as 2.13.0+cpu satisfies ==2.13.0: a second run has nothing to do.
if "$PYTHON" - "$TORCH" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
try:
    sys.exit(not Requirement(sys.argv[1]).specifier.contains(version("torch"), prereleases=True))
except PackageNotFoundError:
    sys.exit(1)
PY
then
    exit 0
fi
answers() {
    "$PYTHON" - "$INDEX/torch/" "$TIMEOUT_S" <<'PY'
import sys
from urllib.request import urlopen
try:
    urlopen(sys.argv[1], timeout=float(sys.argv[2])).read(1)
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")
PY
}
if [ -n "$INDEX" ] && answers; then
    exec "$PYTHON" -m pip install --quiet "$TORCH" --index-url "$INDEX"
fi
[ -z "$INDEX" ] || echo "taking $TORCH from where pip is configured to look; that can be the large CUDA build" >&2
exec "$PYTHON" -m pip install --quiet "$TORCH"
