#!/usr/bin/env bash
# mkdocs 1.6.1: --quiet switches --strict off.
#
# A strict build ends with 1 where a link leads nowhere. It counts the warnings that are logged, and
# --quiet raises the level of the logger itself, so that none is: the same build, asked to be quiet,
# ends with 0, whether strict is said in mkdocs.yml or on the command line. Builds in CI that are told
# to be quiet are not checked.
#
# Seen:
#     --strict: 1
#     --strict --quiet: 0
# Expected: 1 both times.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check mkdocs==1.6.1
mkdir docs
echo '[gone](nowhere.md)' > docs/index.md
echo 'site_name: example' > mkdocs.yml
loud=0 quiet=0
env/bin/mkdocs build --strict --site-dir one > log 2>&1 || loud=$?
env/bin/mkdocs build --strict --quiet --site-dir two > log 2>&1 || quiet=$?
echo "--strict: $loud"
echo "--strict --quiet: $quiet"
[ "$loud" = 1 ] && [ "$quiet" = 0 ] || { echo "it has changed" >&2; exit 1; }
