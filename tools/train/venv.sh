#!/bin/sh
# venv.sh WORK - makes the Python environment WORK/venv that the training programs run in, once. Called by run.sh and experts.sh.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
[ ! -x "$1/venv/bin/python" ] || exit 0
/usr/bin/python3 -m venv "$1/venv"
"$1/venv/bin/pip" install --quiet $(grep -v open_clip "$here/requirements.txt")
