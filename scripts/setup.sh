#!/bin/sh
# Find a Python that is new enough (installing one where we may) and hand over to set_up.py.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)

find_python() {
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

# Succeeds where apt-get may be used without asking anybody for a password; sets $as_root.
may_use_apt() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        return 1
    fi
}

if ! python=$(find_python); then
    if may_use_apt; then
        echo "No Python 3.11 or newer here: installing python3 and python3-venv."
        $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null || true
    fi
    if ! python=$(find_python); then
        echo "Python 3.11 or newer is needed and was not found: install it with its venv module" \
            "(on Debian or Ubuntu: python3.11 python3.11-venv) and run the same command again," \
            "or name an interpreter with PYTHON=/path/to/python3." >&2
        exit 1
    fi
fi
exec "$python" "$here/set_up.py" "$@"
