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

# need_cyrus: the real Cyrus lmtpd, unpacked in a cache folder (its package conflicts with Dovecot's), with
# those of its libraries that are not installed; nothing of it gets into the system.
cyrus=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests-cyrus
need_cyrus() {
    cyrus_runs && return
    local packages=(cyrus-imapd cyrus-common) next library
    [[ -n $(apt-cache show cyrus-imapd 2>/dev/null) ]] || update_package_lists
    for ((next = 0; next < ${#packages[@]}; next++)); do
        while read -r library; do
            [[ " ${packages[*]} " == *" $library "* ]] || packages+=("$library")
        done < <(missing_libraries_of "${packages[next]}")
    done
    echo "Unpacking ${packages[*]} into $cyrus"
    rm -rf "$cyrus"
    mkdir -p "$cyrus/packages"
    download "${packages[@]}" || { update_package_lists && download "${packages[@]}"; }
    for next in "$cyrus"/packages/*.deb; do
        dpkg-deb -x "$next" "$cyrus"
    done
    rm -r "$cyrus/packages"
    # The tests run the programs as another user.
    chmod -R a+rX "$cyrus"
    cyrus_runs || { echo "Cyrus lmtpd does not run: $(cyrus_ldd)" >&2; exit 1; }
}

# missing_libraries_of PACKAGE: the libraries it depends on that are not installed. Where there is a choice
# (a library or another) both are taken, which does no harm in a folder of their own.
missing_libraries_of() {
    local library
    apt-cache depends --important "$1" | sed -nE 's/^ [ |]*(Pre)?Depends: (lib[^: ]*).*/\2/p' |
        while read -r library; do
            [[ $(dpkg-query -W -f '${db:Status-Status}' "$library" 2>/dev/null) == installed ]] || echo "$library"
        done
}

download() {
    (cd "$cyrus/packages" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$@")
}

update_package_lists() {
    if [[ $(id -u) -eq 0 ]]; then apt-get update -qq; else sudo -n apt-get update -qq; fi
}

cyrus_ldd() {
    LD_LIBRARY_PATH=$(find "$cyrus" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:) \
        ldd "$cyrus"/usr/lib/cyrus/bin/{master,lmtpd} 2>&1
}

# cyrus_runs: whether it is unpacked with every library it needs.
cyrus_runs() {
    [[ -x $cyrus/usr/lib/cyrus/bin/lmtpd && -x $cyrus/usr/lib/cyrus/bin/master ]] && ! cyrus_ldd | grep -q 'not found'
}
