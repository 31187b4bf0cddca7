#!/bin/sh
# Installs the Debian packages named in $1 that are missing; without the right to, says what to type.
set -eu
missing=""
for package in $1; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
# Another distribution may have the same under other names: what counts is that it is there.
if ! command -v apt-get >/dev/null; then
    echo "cannot check for$missing: no apt-get here; headless rendering needs EGL with Mesa or a GPU driver," >&2
    echo "and the package meshoptimizer a C++ compiler" >&2
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "missing system packages; install them with" >&2
    echo "    sudo apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; }; then
    echo "could not install$missing; headless rendering and the package meshoptimizer need them" >&2
    exit 1
fi
