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
        if ! { [[ -t 0 ]] && command -v sudo >/dev/null; } && ! sudo -n true 2>/dev/null; then
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
    # The system's own, for any account can run it; another one may be named by PYTHON.
    local python=${PYTHON:-/usr/bin/python3} packages=(gcc libc6-dev pkg-config libsystemd-dev) place
    [[ $python != /usr/bin/python3 ]] || packages+=(python3 python3-venv python3-dev)
    need_packages "${packages[@]}"
    for place in "$top" "$venv" "$top"/build "$top"/*.egg-info; do
        if [[ -e $place && ! -w $place ]]; then
            echo "$place belongs to somebody else: remove it, or be that user (sudo)" >&2
            exit 1
        fi
    done
    [[ $(readlink -f "$venv/bin/python") == $(readlink -f "$python") ]] || "$python" -m venv --clear "$venv"
    # Not in place: what is tested is what an administrator gets.
    "$venv/bin/pip" install --quiet --disable-pip-version-check --use-pep517 "$@" "$top[auth,idna,sql]"
}

# Packages that conflict with installed ones, or would change the system, are only unpacked, each in a cache folder of
# its own with those of its libraries that are not installed.
cyrus=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests-cyrus
exim=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests-exim
moosefs=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests-moosefs
node_exporter=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests-node-exporter
postgresql=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests-postgresql

# need_cyrus: the real Cyrus and lmtptest. Its package conflicts with Dovecot's.
need_cyrus() {
    local programs=(usr/lib/cyrus/bin/{master,lmtpd,imapd,timsieved,lmtptest})
    runs "$cyrus" "${programs[@]}" || unpack "$cyrus" cyrus-imapd cyrus-common cyrus-clients
    runs "$cyrus" "${programs[@]}" || { echo "Cyrus does not run" >&2; exit 1; }
}

# need_exim: the real Exim. Its package conflicts with Postfix's, and makes an account.
need_exim() {
    runs "$exim" usr/sbin/exim4 || unpack "$exim" exim4-daemon-light
    runs "$exim" usr/sbin/exim4 || { echo "Exim does not run" >&2; exit 1; }
}

# need_node_exporter: Prometheus' node_exporter. Its package starts a server that listens to everybody.
need_node_exporter() {
    runs "$node_exporter" usr/bin/prometheus-node-exporter || unpack "$node_exporter" prometheus-node-exporter
    runs "$node_exporter" usr/bin/prometheus-node-exporter || { echo "node_exporter does not run" >&2; exit 1; }
}

# need_postgresql: the real PostgreSQL. Its package makes a database cluster and starts a server on it.
need_postgresql() {
    local version
    has_postgresql && return
    update_package_lists
    # The package "postgresql" itself is empty: it depends on that of this release's version.
    version=$(apt-cache depends --important postgresql | sed -nE 's/^ *Depends: postgresql-([0-9]+)$/\1/p')
    unpack "$postgresql" postgresql-"$version" postgresql-client-"$version"
    has_postgresql || { echo "PostgreSQL does not run" >&2; exit 1; }
}

# has_postgresql: whether it is unpacked, of whatever version.
has_postgresql() {
    local programs=("$postgresql"/usr/lib/postgresql/*/bin/{postgres,initdb,psql})
    runs "$postgresql" "${programs[@]#"$postgresql/"}"
}

# need_moosefs: the servers and the FUSE client of MooseFS. Its packages would start servers.
need_moosefs() {
    local programs=(usr/sbin/mfsmaster usr/sbin/mfschunkserver usr/bin/mfsmount)
    runs "$moosefs" "${programs[@]}" || unpack "$moosefs" moosefs-master moosefs-chunkserver moosefs-client
    runs "$moosefs" "${programs[@]}" || { echo "MooseFS does not run" >&2; exit 1; }
}

# runs FOLDER PROGRAM...: whether these are unpacked there with every library they need.
runs() {
    local programs=("${@:2}") name libraries
    for name in "${programs[@]}"; do
        [[ -x $1/$name ]] || return
    done
    libraries=$(find "$1" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
    ! LD_LIBRARY_PATH=$libraries ldd "${programs[@]/#/$1/}" 2>&1 | grep 'not found'
}

# unpack FOLDER PACKAGE...
unpack() {
    local folder=$1 packages=("${@:2}") next library
    [[ -n $(apt-cache show "$2" 2>/dev/null) ]] || update_package_lists
    for ((next = 0; next < ${#packages[@]}; next++)); do
        while read -r library; do
            [[ " ${packages[*]} " == *" $library "* ]] || packages+=("$library")
        done < <(missing_libraries_of "${packages[next]}")
    done
    echo "Unpacking ${packages[*]} into $folder"
    rm -rf "$folder"
    mkdir -p "$folder/packages"
    download "$folder/packages" "${packages[@]}" ||
        { update_package_lists && download "$folder/packages" "${packages[@]}"; }
    for next in "$folder"/packages/*.deb; do
        dpkg-deb -x "$next" "$folder"
    done
    rm -r "$folder/packages"
    # The tests run the programs as another user.
    chmod -R a+rX "$folder"
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

# download FOLDER PACKAGE...
download() {
    (cd "$1" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "${@:2}")
}

update_package_lists() {
    apt-get update -qq
}

# The Debian roots that tests/container.py boots copies of are in this folder, each by the name of its release: the
# machine's own, and Debian 13, whose Dovecot is configured in another way than those before.
LMTPD_TEST_ROOTS=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests
export LMTPD_TEST_ROOTS
own_release=$(. /etc/os-release && echo "$VERSION_CODENAME")

# need_container: have those roots, made with the machine's own apt sources and settings, and in each the wheels
# of an extra, for there is no network. Made again when the list of packages changes, or after a month.
need_container() {
    if [[ $(id -u) -ne 0 ]]; then
        echo "Only root can make and boot a container: the tests that need one will fail" >&2
        return
    fi
    need_packages mmdebstrap systemd-container
    mkdir -p "$LMTPD_TEST_ROOTS"
    need_root "$own_release"
    # The same again on Debian 13 itself: it is there then.
    need_root trixie
}

# need_root RELEASE
need_root() {
    local packages=systemd,systemd-sysv,dbus,python3,python3-venv,python3-setuptools,python3-wheel,python3-docopt,python3-systemd,python3-idna,python3-argon2,python3-cffi,postfix,libsasl2-modules,dovecot-imapd,openssl,procps,man-db
    # Those that recipes install, which wait in /opt/packages.
    local later=dovecot-managesieved,dovecot-lmtpd,openbsd-inetd,xinetd,sieve-connect,openssh-server,rsync,sqlite3,postfix-sqlite
    local root=$LMTPD_TEST_ROOTS/$1
    (
        # Another test run may have machines booted from it, or be making it, at this moment.
        flock --shared 9
        is_made "$root" "$packages $later" && exit
        flock 9
        is_made "$root" "$packages $later" && exit
        echo "Making a root of $1 in $LMTPD_TEST_ROOTS"
        rm -rf "$root"
        make_root "$1" "$root" "$packages" "$later"
        # Pure Python, so it does not matter whose pip fetches them.
        "$venv/bin/pip" wheel --quiet --disable-pip-version-check --wheel-dir "$root/opt/wheels" scramp
        echo "$packages $later" >"$root/.made-of"
    ) 9>"$root.lock"
}

# is_made ROOT PACKAGES: whether the root is there, of these packages and not stale.
is_made() {
    local stamp=$1/.made-of
    [[ $(cat "$stamp" 2>/dev/null) == "$2" && -n $(find "$stamp" -mtime -30) ]]
}

# make_root RELEASE ROOT PACKAGES LATER: the root, with nothing in it that only a person would read, nor this machine's
# name. LATER: packages that are only fetched.
# Dovecot runs in it where a test starts it.
make_root() {
    local sources settings
    [[ -n $(distribution_sources) ]] || apt-get update -qq
    if [[ $1 == "$own_release" ]]; then
        mapfile -t sources < <(distribution_sources)
    else
        need_keys_of "$1"
        mapfile -t sources < <(debian_sources "$1")
    fi
    # Proxies, certificates, time-outs and the like.
    settings=$(mktemp)
    apt-config dump Acquire >"$settings"
    mmdebstrap --quiet --mode=root --variant=minbase --include="$3" --aptopt="$settings" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook='rm -f "$1"/var/cache/apt/archives/*.deb' \
        --customize-hook="for package in ${4//,/ }; do chroot \"\$1\" apt-get -qq install -y --no-install-recommends --download-only \$package || exit; done" \
        --customize-hook='mkdir -p "$1/opt/packages" && mv "$1"/var/cache/apt/archives/*.deb "$1/opt/packages"' \
        --customize-hook='rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap" "$1/etc/hostname"' \
        --customize-hook='chroot "$1" postconf -X myhostname' \
        --customize-hook='chroot "$1" systemctl --quiet disable dovecot.service' \
        "$1" "$2" "${sources[@]}"
    rm -f "$settings"
}

# distribution_sources: the files that say where this machine gets the distribution's own packages from.
# Those of other vendors have no place in the root. Empty before the first apt-get update.
distribution_sources() {
    apt-get indextargets --format '$(ORIGIN) $(SOURCESENTRY)' 'Created-By: Packages' |
        sed -n -E 's/^(Debian|Ubuntu) (.*):[0-9]+$/\2/p' | sort -u
}

# debian_sources RELEASE: that release of Debian at the mirrors of this machine's own, with its updates if this machine
# has them. Empty on Ubuntu; then mmdebstrap takes Debian's usual mirrors.
debian_sources() {
    apt-get indextargets --format '$(ORIGIN) deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        sed -n -E "s/^Debian (deb [^ ]+) $own_release(-updates|-security)? /\1 $1\2 /p" | sort -u
}

# need_keys_of RELEASE: the keys of that release of Debian, which is not this machine's own.
need_keys_of() {
    local key=/usr/share/keyrings/debian-archive-$1-stable.gpg
    [[ -e $key ]] && return
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y debian-archive-keyring >/dev/null
    [[ -e $key ]] || { echo "$key is missing: debian-archive-keyring is too old for a root of $1" >&2; exit 1; }
}

# need_inetds: have openbsd-inetd and xinetd, which Debian doesn't install side by side: xinetd is unpacked only, to
# LMTPD_TEST_XINETD. It needs no library that openbsd-inetd doesn't.
LMTPD_TEST_XINETD=$LMTPD_TEST_ROOTS/xinetd/usr/sbin/xinetd
export LMTPD_TEST_XINETD
need_inetds() {
    need_packages openbsd-inetd
    [[ -x $LMTPD_TEST_XINETD ]] && return
    local folder=$LMTPD_TEST_ROOTS/xinetd
    mkdir -p "$folder"
    (
        cd "$folder"
        apt-get -qq -o APT::Sandbox::User=root download xinetd || { apt-get update -qq && apt-get -qq -o APT::Sandbox::User=root download xinetd; }
        dpkg-deb --extract xinetd_*.deb .
    )
}

# need_courier: Courier's IMAP server and its tools for Maildirs. Its packages take the place of an installed MTA's.
courier=${XDG_CACHE_HOME:-$HOME/.cache}/lmtpd-tests-courier
need_courier() {
    local programs=(usr/bin/{imapd,maildirmake.courier,deliverquota.courier})
    runs "$courier" "${programs[@]}" || unpack "$courier" courier-imap courier-base courier-authlib
    runs "$courier" "${programs[@]}" || { echo "Courier does not run" >&2; exit 1; }
}
