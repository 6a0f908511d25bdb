# shellcheck shell=bash
# Sourced by tests/demo and tests/run: what they need on a fresh Debian or Ubuntu.
# Repeatable: what is there already is left alone.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$top/.venv

# need_packages NAME...: have these Debian packages installed, or say which are missing and stop.
need_packages() {
    local name missing=()
    for name in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || missing+=("$name")
    done
    [[ ${#missing[@]} -eq 0 ]] && return
    local as_root=()
    if [[ $(id -u) -ne 0 ]]; then
        if ! sudo -n true 2>/dev/null; then
            printf 'These packages are missing, and neither root nor sudo is there to install them:\n  apt-get install %s\n' "${missing[*]}" >&2
            exit 1
        fi
        as_root=(sudo)
    fi
    echo "Installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

# need_venv NAME...: lmtpd as it is in this tree, and these Python packages, in .venv.
need_venv() {
    need_packages gcc libc6-dev pkg-config libsystemd-dev
    # The system's own, for any account can run it; another one may be named by PYTHON.
    local python=${PYTHON:-/usr/bin/python3}
    [[ $python != /usr/bin/python3 ]] || need_packages python3 python3-venv python3-dev
    [[ $(readlink -f "$venv/bin/python") == $(readlink -f "$python") ]] || "$python" -m venv --clear "$venv"
    # Not in place: what is tested is what an administrator gets.
    "$venv/bin/pip" install --quiet --disable-pip-version-check --use-pep517 "$@" "$top"
}
