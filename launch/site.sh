#!/usr/bin/env bash
# The documentation as a site. `bash launch/site.sh` builds it in the folder site/, for any web server or, without its
# search, to be opened from disk; it fails at a link that leads nowhere. `bash launch/site.sh serve` shows it at
# http://127.0.0.1:8000 and follows changes. Other arguments go to `mkdocs build`, e.g. --site-dir DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh docs
export NO_MKDOCS_2_WARNING=1 # the theme's advice to those who choose a generator, above every build
if [ "${1:-}" = serve ]; then
    exec .venv/bin/python -m mkdocs serve --config-file launch/site/mkdocs.yml "${@:2}"
fi
exec .venv/bin/python -m mkdocs build --strict --config-file launch/site/mkdocs.yml "$@"
