"""Receive mail by LMTP on standard input or sockets, and deliver it into Maildirs.

Usage:
  lmtpd [-C config-file] [-U uses] [-T timeout] [-D] [-H] [-a]
  lmtpd --help
  lmtpd --version

Options:
  -C config-file  Read options from this file [default: /etc/imapd.conf].
  -U uses         Connections a process serves before it exits [default: 250].
  -T timeout      Seconds to wait for a new connection, 0 for ever [default: 60].
  -D              Run the debugger of the debug_command option.
  -H              Expect a HAProxy PROXY header before the greeting.
  -a              Trust internet connections instead of requiring LMTP AUTH.
  --help          Show this text.
  --version       Show the version.
"""

# The file follows the path of a message. Helpers come first, main() last. A section
# uses only the sections above it. The sections, and what each owns:
#
# Configuration   the table of options, the syntax of imapd.conf(5)
# Logging         where a log line goes, and its form
# Replies         replies, and their form on the wire
# Stopping        what ends the process early: signals, timers, the shutdown file
# Connection      octets in and out, deadlines, TLS, who the peer is
# Local services  requests to daemons on this host
# Addresses       paths and parameters of commands; user, detail and domain of a recipient
# Files           identities, guarded paths, drafts, durable files and directories
# Message         what comes after DATA or BDAT: decoding, limits, header, added fields
# Fields          the syntax of header fields
# MIME            parts, encodings, charsets, HTML
# Maildir++       names of folders and files on the disk, quota, keywords, subscriptions, locks
# Mailboxes       a user's Maildir: folders, quota check, placing a message
# Users           the user databases
# Mailstore       the way from a recipient to a mailbox
# Records         the database of messages that were delivered already
# Delivery        one message and all its recipients: placements, replies to store errors
# Authentication  SASL mechanisms, password checks, who may deliver
# Session         the verbs, and the state of the transaction
# Service         where connections come from, and how many a process serves
# Main            command line, configuration, privileges, exit status

from __future__ import annotations

import errno
import itertools
import os
import select
import stat
import sys
import time

TYPE_CHECKING = False  # type checkers take a constant of this name for True
if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from sqlite3 import Connection as Database
    from ssl import SSLContext
    from typing import Any, NoReturn, TypeVar

    T = TypeVar("T")
    Mechanism = Generator[bytes, bytes, str]
else:
    # The modules signal and socket add enumerations of all constants to these two. Making the enumerations takes more
    # than half of the time that the interpreter itself takes to start.
    import _signal as signal
    import _socket as socket

__version__ = "0.1.0"

PRODUCT = f"lmtpd {__version__}"
CRLF, LF = b"\r\n", b"\n"
READ_SIZE = 65536  # octets read at a time
FOREVER = float("inf")  # a deadline that never comes
# docopt's result for an empty command line, written out because importing docopt is slow.
NO_ARGUMENTS = {
    "-C": "/etc/imapd.conf",
    "-U": "250",
    "-T": "60",
    **dict.fromkeys(("-D", "-H", "-a", "--help", "--version"), False),
}


# ======================================================================
# Configuration
#
# Owns the table of options and the syntax of imapd.conf(5).
# Must not know what the options do.
# ======================================================================

SWITCHES = {
    **dict.fromkeys(("yes", "on", "true", "t", "1"), True),
    **dict.fromkeys(("no", "off", "false", "f", "0"), False),
}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
OCTETS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
OPTION_PUNCTUATION = str.maketrans("", "", "-_")
TLS_VERSIONS = ("tls1_0", "tls1_1", "tls1_2", "tls1_3")
FACILITIES = {  # syslog(3)
    **{name: number << 3 for number, name in enumerate(("kern", "user", "mail", "daemon", "auth", "syslog", "lpr"))},
    **{name: number << 3 for number, name in enumerate(("news", "uucp", "cron", "authpriv", "ftp"), 7)},
    **{f"local{number}": 16 + number << 3 for number in range(8)},
}
XLIST = "xlist-"  # before the special use, in the name of an option
# The options of Cyrus IMAP 3.6 to 3.10 that lmtpd does not implement. Those of the first group change what happens to
# mail.
CHANGING_OPTIONS = """
    anysievefolder autocreate_sieve_compiled_script autocreate_sieve_folders autocreate_sieve_script
    autocreate_sieve_script_compile autocreate_sieve_script_compiled autosievefolders mailbox_initial_flags
    mailnotifier notifysocket proxyservers sendmail sendmail_auth_id sieve_allowreferrals
    sieve_duplicate_max_expiration sieve_extensions sieve_folder sieve_maxscripts sieve_maxscriptsize
    sieve_sasl_send_unsolicited_capability sieve_use_lmtp_reject sieve_utf8fileinto sieve_vacation_max_response
    sieve_vacation_min_response sievedir sievenotifier sieveusehomedir smtp_auth_authname smtp_auth_password
    smtp_auth_realm smtp_backend smtp_host userdeny_db userdeny_db_path username_tolower
"""
OTHER_OPTIONS = """
    acl_admin_implies_write afspts_localrealms afspts_mycell allowallsubscribe allowanonymouslogin allowapop
    allowdeleted allownewnews allowsetacl allowusermoves altnamespace altprefix anyoneuseracl auditlog auth_mech
    autocreate_acl autocreate_subscribe_sharedfolders autocreate_subscribe_sharedfolders_all
    autocreateinboxfolders autocreatequota autocreatequotamsg autoexpunge autosubscribe_all_sharedfolders
    autosubscribeinboxfolders autosubscribesharedfolders boundary_limit client_bind client_bind_name
    client_timeout commandmintimer createonpost crossdomains crossdomains_onlyother cyrus_group
    debug_log_sync_partition_choice debug_writefail_guid defaultacl defaultsearchtier defaultserver delete_mode
    delete_unsubscribe deletedprefix deleteright disable_shared_namespace disable_user_namespace
    disconnect_on_vanished_mailbox duplicate_db expunge_mode failedloginpause flushseenstate foolstupidclients
    force_sasl_client_mech fulldirhash generate_compiled_sieve_script hashimapspool hostname_mechs
    hostname_password idlesocket ignorereference imapidlepoll imapidletimeout imapidresponse imapmagicplus
    imipnotifier implicit_owner_rights improved_mboxlist_sort iolog literalminus lmtp_preparse lmtpsocket
    lmtptxn_timeout lock_debugtime loginrealms loginuseacl logtimestamps mailbox_default_options
    mailbox_legacy_dirs mailbox_maxmessages_addressbook mailbox_maxmessages_calendar mailbox_maxmessages_email
    master_bind_errors_fatal master_pid_file master_ready_file maxargssize maxheaderlines maxliteral
    maxlogins_per_host maxlogins_per_user maxquoted maxword mboxkey_db mboxlist_db mboxlist_db_path
    metapartition_files netscapeurl notesmailbox notify_external plaintextloginalert plaintextloginpause
    proc_path ptloader_sock qosmarking quota_db quota_db_path quota_use_conversations quotawarn quotawarnkb
    quotawarnmsg quotawarnpercent quotawarnsize readonly restore_authname restore_password restore_realm
    reverseacls reverseuniqueids rfc2046_strict rfc2047_utf8 rfc3028_strict seenstate_db sharedprefix
    skiplist_always_checkpoint skiplist_unsafe sortcache_db specialuse_extra specialuse_nochildren
    specialuse_protect specialusealways srvtab statuscache statuscache_db statuscache_db_path submitservers
    subscription_db suppress_capabilities telemetry_bysessionid temp_path timeout tls_ca_file tls_ca_path
    tls_cert_file tls_cipher_list tls_client_cert tls_client_key tls_eccurve tls_key_file
    tls_prefer_server_ciphers tls_server_ca_dir tls_server_ca_file tls_server_dhparam tls_session_timeout
    tls_sessions_db tls_sessions_db_path tlscache_db tlscache_db_path uidl_format unix_group_enable userprefix
    webdav_attachments_baseurl webdav_attachments_max_binary_attach_size websocket_timeout
"""
# Options of Cyrus in every version begin so. They do not concern lmtpd.
OPTION_FAMILIES = """
    addressbook annotation_ aps_ archive_ backup_ caldav_ calendar carddav_ caringo_ conversations dav event_
    fastmail http icalendar_ ischedule_ jmap ldap_ mboxname_ mupdate_ news nntp object_storage_ openio_
    partition_select_ pop prometheus_ proxyd_ proxy_ pts rss_ sasl_ search_ serverlist sync_ sql_ srs_ vcard_
    virusscan_ xbackup_ zoneinfo_
"""
SIMILARITY_MINIMUM = 0.8  # how similar the name of an option is to a misspelt one, by difflib


class ConfigError(Exception):
    """The configuration cannot be used. The text says where, and what to do."""


# The types of options. Each takes the text of a value and returns the value, or
# raises ValueError with a text that continues "'value' ...".


def as_text(value: str) -> str:
    """A string, as it is."""
    return value


def as_path(value: str) -> str:
    """An absolute path."""
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return value


def as_file(value: str) -> str:
    """The path of a file, or the name of a systemd credential (systemd.exec(5), LoadCredential=); "" for none."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if value.startswith("/") or not value:
        return value
    if not folder or "/" in value:
        raise ValueError("must be an absolute path, or the name of a credential that systemd passes")
    return f"{folder}/{value}"


def optional(parse: Callable[[str], str]) -> Callable[[str], str]:
    """The same type, and "" for none."""

    def parse_optional(value: str) -> str:
        return parse(value) if value else ""

    parse_optional.__qualname__ = parse.__qualname__
    return parse_optional


def as_delimiters(value: str) -> str:
    """Characters, each of which may divide user and detail, such as + or +-."""
    if not value.isascii() or not value.isprintable() or any(c.isalnum() or c in ' "@/.<>' for c in value):
        raise ValueError("must be punctuation that may stand in an address, such as + or -")
    return value


def as_names(value: str) -> tuple[str, ...]:
    """Names with white space between them."""
    return tuple(value.split())


def as_folders(value: str) -> tuple[str, ...]:
    """Names of folders with | between them. They may contain white space."""
    return tuple(name.strip() for name in value.split("|") if name.strip())


def as_switch(value: str) -> bool:
    """yes, on, true, t, 1 or no, off, false, f, 0, in any case."""
    if (result := SWITCHES.get(value.lower())) is None:
        raise ValueError("must be yes or no")
    return result


def as_number(value: str) -> int:
    """A whole number, 0 or more."""
    if not (value.isascii() and value.isdigit()):
        raise ValueError("must be a whole number")
    return int(value)


def limited(parse: Callable[[str], int], low: str, high: str) -> Callable[[str], int]:
    """The same type, from low to high, which are texts as in imapd.conf."""

    def parse_limited(value: str) -> int:
        if not parse(low) <= (result := parse(value)) <= parse(high):
            raise ValueError(f"must be from {low} to {high}")
        return result

    parse_limited.__qualname__ = parse.__qualname__
    return parse_limited


def as_octal(value: str) -> int:
    """An octal number, such as a file creation mask."""
    if value.strip("01234567"):
        raise ValueError("must be an octal number")
    return int(value, 8)


def as_duration(value: str) -> int:
    """Seconds: 90, 90s, 5m, 1h30m, 3d."""
    total, digits = 0, ""
    for character in value.lower():
        if character.isascii() and character.isdigit():
            digits += character
        elif character in SECONDS and digits:
            total, digits = total + int(digits) * SECONDS[character], ""
        else:
            raise ValueError("must be a duration such as 90s, 5m or 1h30m")
    return total + int(digits or "0")


def as_octets(value: str) -> int:
    """Octets: 1000, 64K, 20M, 1G. The units are powers of 1024, and a B may follow them."""
    digits = value.lower().rstrip("kmgtb")
    unit = value.lower()[len(digits) :]
    factor = OCTETS.get(unit.removesuffix("b"))
    if factor is None or not (value.isascii() and digits.isdigit()):
        raise ValueError("must be a size such as 1000, 64K or 20M")
    return int(digits) * factor


def as_kibioctets(value: str) -> int:
    """Octets, given in units of 1024 octets, or with a unit such as 20M; -1 for none."""
    if value == "-1":
        return -1
    return as_octets(f"{value}K" if value.isdigit() else value)


def as_count_or_none(value: str) -> int:
    """A whole number, 0 or more, or -1 for none."""
    return -1 if value == "-1" else as_number(value)


def as_choice(*allowed: str) -> Callable[[str], str]:
    """One of the words allowed, in any case."""

    def parse(value: str) -> str:
        if value.lower() not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value.lower()

    return parse


def as_words(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """Some of the words allowed, in any case, with white space between them."""

    def parse(value: str) -> tuple[str, ...]:
        words = tuple(value.lower().split())
        if not set(allowed).issuperset(words):
            raise ValueError(f"may have the words {', '.join(allowed)}")
        return words

    return parse


def as_template(variables: str) -> Callable[[str], str]:
    """An absolute path in which %X is a variable, for each letter X of variables, and %% is a %."""

    def parse(value: str) -> str:
        expand(value, dict.fromkeys(variables, ""))
        if not value.startswith(("/", "%p/", "%h/")) or not value.strip("/"):
            raise ValueError("must be an absolute path, and not /")
        return value

    return parse


def expand(template: str, values: dict[str, str]) -> str:
    """The template with values["X"] in place of each %X, and % in place of %%. Raises ValueError for any other %."""
    literal, *places = template.replace("%%", "\0").split("%")
    parts = [literal]
    for place in places:
        if place[:1] not in values or not place:
            raise ValueError(f"may contain only %{', %'.join(values)} and %%")
        parts += values[place[0]], place[1:]
    return "".join(parts).replace("\0", "%")


def template_variables(template: str) -> set[str]:
    """The letters of the variables in a template, see expand()."""
    return {place[:1] for place in template.replace("%%", "").split("%")[1:]}


def as_command(value: str) -> str:
    """A shell command in which %s, %d and %s are the program, the process id and the service, and %% is a %."""
    if debug_command(value, "", 0, "") is None:
        raise ValueError("may contain %s, %d and %s, in this order, and %%, but no other conversion")
    return value


def debug_command(template: str, program: str, pid: int, service: str) -> str | None:
    """The command of the template debug_command; None if the template has a conversion that it must not have."""
    literal, *places = template.replace("%%", "\0").split("%")
    arguments = [("s", program), ("d", str(pid)), ("s", service)]
    if len(places) > len(arguments):
        return None
    for place, (conversion, argument) in zip(places, arguments):
        if not place.startswith(conversion):
            return None
        literal += argument + place[1:]
    return literal.replace("\0", "%")


class Option:
    """One row of the table: the type, the default as text (None: it must be set), and the meaning."""

    def __init__(self, parse: Callable[[str], object], default: str | None, meaning: str) -> None:
        self.parse, self.default, self.meaning = parse, default, meaning


def option(parse: Callable[[str], T], default: str | None, meaning: str) -> T:
    """An Option. A type checker sees the value that a Config has in its place."""
    return Option(parse, default, meaning)  # type: ignore[return-value]


class Config:
    """The options of imapd.conf(5) as typed attributes. The class body is their table."""

    admins = option(as_names, "", "the users who may deliver after authentication")
    allowplaintext = option(as_switch, "no", "accept plaintext passwords without TLS")
    allowstarttls = option(as_switch, "no", "offer STARTTLS to untrusted clients")
    autocreate_inbox_folders = option(as_folders, "", "the folders of a new Maildir")
    autocreate_post = option(as_switch, "no", "make the Maildir of an unknown user when mail arrives")
    autocreate_quota = option(as_kibioctets, "-1", "the quota of a new Maildir in units of 1024 octets; -1: none")
    autocreate_quota_messages = option(as_count_or_none, "-1", "the most messages of a new Maildir; -1: no limit")
    autocreate_subscribe_folders = option(as_folders, "", "the folders to which a new user is subscribed")
    autocreate_users = option(as_names, "anyone", "users whose Maildirs are made: userids, group:NAME, anyone")
    chatty = option(as_switch, "no", "log every command")
    configdirectory = option(as_path, None, "the directory for lmtpd's own files")
    cyrus_user = option(as_text, "", "the account to run as when started by root")
    debug = option(as_switch, "no", "log details that help to find a fault")
    debug_command = option(as_command, "", "the command that -D runs")
    default_quota = option(as_octets, "0", "the quota of a Maildir that has none of its own, in octets; 0: none")
    default_quota_messages = option(as_number, "0", "the most messages of such a Maildir; 0: no limit")
    defaultdomain = option(as_text, "", "the domain that userids leave out")
    defaultpartition = option(as_text, "", "the partition of the Maildirs; needed only when there are several")
    duplicate_db_path = option(
        optional(as_path), "", "the database of delivered messages; by default deliver.db in configdirectory"
    )
    duplicate_expiry = option(as_duration, "3d", "how long a delivered message is remembered")
    duplicatesuppression = option(as_switch, "yes", "do not store a message that the mailbox already has")
    lmtp_auth_timeout = option(
        limited(as_duration, "1s", "1d"), "60s", "the time for a client that is not trusted to authenticate"
    )
    lmtp_autosubscribe = option(as_switch, "no", "subscribe users to the folders that are made for them")
    lmtp_catchall_mailbox = option(as_text, "", "the user who gets the mail of unknown users")
    lmtp_command_timeout = option(
        limited(as_duration, "1s", "1d"), "360s", "the time for a client to send a line or read a reply"
    )
    lmtp_delivered_to = option(as_switch, "no", "add a field Delivered-To with the recipient to each copy")
    lmtp_detail_create = option(as_switch, "no", "make the folder that a sub-address names")
    lmtp_downcase_rcpt = option(as_switch, "yes", "put the user part of recipients into lower case")
    lmtp_exclude_specialuse = option(
        as_names, r"\Drafts \Scheduled \Snoozed", "special uses of folders that no sub-address reaches"
    )
    lmtp_fuzzy_mailbox_match = option(
        as_switch, "no", "ignore case, and take - _ and space as one; else take the nearest parent"
    )
    lmtp_max_bad_commands = option(as_number, "50", "the most malformed commands between two messages; 0: no limit")
    lmtp_max_idle_commands = option(as_number, "1000", "the most commands without a message; 0: no limit")
    lmtp_max_recipients = option(limited(as_number, "1", "999999"), "1000", "the most recipients of a transaction")
    lmtp_maxchild = option(
        limited(as_number, "1", "100000"), "50", "the most connections that a listening lmtpd serves at once"
    )
    lmtp_maxchild_untrusted = option(
        limited(as_number, "0", "100000"), "0", "the same for clients that are not trusted; 0: as lmtp_maxchild"
    )
    lmtp_over_quota_perm_failure = option(
        as_switch, "no", "refuse mail for a full mailbox permanently (552), not temporarily"
    )
    lmtp_prefork = option(as_number, "0", "idle workers that a listening lmtpd keeps")
    lmtp_session_timeout = option(as_duration, "0", "the longest time of a session; 0: no limit")
    lmtp_strict_quota = option(
        as_switch, "no", "refuse a message that would not fit into the quota, not only mail for a full mailbox"
    )
    lmtp_strict_rfc2821 = option(as_switch, "yes", "refuse non-ASCII addresses without SMTPUTF8")
    maildir_path = option(as_template("pundh"), "%p/%u", "the path of a user's Maildir")
    maxmessagesize = option(as_octets, "0", "the largest message accepted, in octets; 0: no limit")
    munge8bit = option(as_switch, "no", "replace 8-bit octets in message headers by X")
    passwd_min_uid = option(as_number, "1000", "with userdb: passwd, accounts with a lower user id have no mailbox")
    postmaster = option(as_text, "postmaster", "the user who gets the mail of postmaster")
    postuser = option(as_text, "", "the user part of addresses of shared folders")
    quota_exclude_deleted = option(as_switch, "no", "do not count messages that are marked as deleted in a quota")
    quota_exclude_folders = option(as_folders, "", "folders that do not count in a quota")
    recipient_delimiter = option(as_delimiters, "+", "characters that divide the user from the detail of an address")
    reject8bit = option(as_switch, "no", "refuse messages with 8-bit octets in the header")
    sasl_auth_socket_path = option(
        as_path, "/run/dovecot/auth-client", "the socket of Dovecot's authentication service"
    )
    sasl_mech_list = option(as_names, "", "the mechanisms to offer; by default all that are possible")
    sasl_minimum_layer = option(
        as_number, "0", "the fewest bits of a TLS cipher with which AUTH is accepted; 0: no TLS needed"
    )
    sasl_password_file = option(as_file, "", "the file of users and password verifiers")
    sasl_pwcheck_method = option(
        as_choice("saslauthd", "dovecot", "file", "auxprop"), "saslauthd", "what checks passwords"
    )
    sasl_saslauthd_path = option(as_path, "/run/saslauthd/mux", "the socket of saslauthd")
    serverinfo = option(
        as_choice("on", "min", "off"), "on", "whether the greeting and the trace header show the product"
    )
    servername = option(as_text, "", "the name of this host in replies and headers; by default the system's")
    shared_maildir = option(optional(as_path), "", "the Maildir of the shared folders")
    singleinstancestore = option(as_switch, "yes", "store a message as one file with hard links for its recipients")
    soft_noauth = option(as_switch, "yes", "refuse unauthenticated clients temporarily (430), not permanently (530)")
    syslog_facility = option(as_choice(*FACILITIES), "mail", "the facility of lines sent to syslog")
    syslog_prefix = option(as_text, "", "a prefix of the name lmtpd in syslog, followed by a slash")
    tcp_keepalive = option(as_switch, "no", "probe silent internet connections")
    tcp_keepalive_cnt = option(
        limited(as_number, "0", "127"), "0", "unanswered probes that end a connection; 0: the system's default"
    )
    tcp_keepalive_idle = option(
        limited(as_duration, "0", "32767"), "0", "silence before the first probe; 0: the system's default"
    )
    tcp_keepalive_intvl = option(
        limited(as_duration, "0", "32767"), "0", "time between probes; 0: the system's default"
    )
    tls_ciphers = option(as_text, "", "the ciphers for TLS 1.2, in OpenSSL's form; by default OpenSSL's")
    tls_client_ca_dir = option(as_file, "", "the directory of CA certificates that verify those of clients")
    tls_client_ca_file = option(as_file, "", "the file of CA certificates that verify those of clients")
    tls_client_certs = option(
        as_choice("off", "optional", "require"), "optional", "whether clients are asked for certificates"
    )
    tls_crl_file = option(as_file, "", "the file of revoked client certificates")
    tls_required = option(as_switch, "no", "accept no mail from untrusted clients before STARTTLS")
    tls_server_cert = option(as_file, "", "the file of this server's certificate and its chain")
    tls_server_key = option(as_file, "", "the file of the certificate's private key, if it is a file of its own")
    tls_versions = option(
        as_words(*TLS_VERSIONS), "tls1_2 tls1_3", "the versions of TLS; those before 1.2 are never used"
    )
    umask = option(limited(as_octal, "0", "077"), "077", "the file creation mask")
    unixhierarchysep = option(as_switch, "yes", "whether a slash divides the levels of a folder's name, and not a dot")
    userdb = option(as_choice("maildir", "passwd", "dovecot"), "maildir", "the user database")
    userdb_socket_path = option(as_path, "/run/dovecot/auth-userdb", "the socket of Dovecot's user database")
    virtdomains = option(as_choice("off", "userid", "on"), "off", "whether the domain is a part of the userid")

    files: tuple[str, ...]  # the configuration file, and those that it includes
    partition: str  # the directory of all Maildirs
    special_uses: dict[str, str]  # special uses (RFC 6154) and their folders, from the options xlist-USE
    ignored: list[tuple[str, str]]  # options that have no effect, each "file:line" and the name
    warnings: list[str]  # what is odd about the settings, for the log

    @classmethod
    def table(cls) -> dict[str, Option]:
        """The options by name."""
        return {name: row for name, row in vars(cls).items() if isinstance(row, Option)}

    @classmethod
    def load(cls, file: str, service: str = "lmtp") -> Config:
        """Reads a file. SERVICE_name overrides name. service: the name before the underscore.

        Raises ConfigError. Source: imapd.conf(5).
        """
        service = service.lower()
        settings, files = read_settings(file)
        config = cls()
        config.files = tuple(files)
        for name, row in cls.table().items():
            override = settings.pop(f"{service}_{name}", None)
            setting = settings.pop(name, None)
            value, where = override or setting or (row.default, file)
            if value is None:
                raise ConfigError(f"{file}: {name} must be set; add a line '{name}: ...'")
            setattr(config, name, parsed(row.parse, name, (value, where)))
        config.servername = config.servername or socket.gethostname()
        config.defaultdomain = config.defaultdomain.lower()
        config.partition = default_partition(config, settings, service, file)
        config.special_uses = {}
        for prefix in (XLIST, f"{service}_{XLIST}"):  # the latter overrides the other
            for name in [name for name in settings if name.startswith(prefix)]:
                config.special_uses[f"\\{name[len(prefix) :]}"] = settings.pop(name)[0]
        config.ignored = [(where, name) for name, (_, where) in settings.items() if "partition-" not in name]
        config.warnings = []
        for limit in ("lmtp_maxchild", "lmtp_maxchild_untrusted"):
            allowed = getattr(config, limit)
            if 0 < allowed < config.lmtp_prefork:
                text = (
                    f"lmtp_prefork is {config.lmtp_prefork}, but {limit} allows {allowed}: lower it, or raise {limit}"
                )
                config.warnings.append(text)
        return config


def is_cyrus_option(name: str) -> bool:
    """Whether it is an option of Cyrus that lmtpd does not implement, perhaps with the name of a service before it."""
    cyrus_options = {*CHANGING_OPTIONS.split(), *OTHER_OPTIONS.split()}
    service_free = name.partition("_")[2]
    families = tuple(OPTION_FAMILIES.split())
    return any(
        each in cyrus_options or each in Config.table() or each.startswith(families) for each in (name, service_free)
    )


def changes_mail(name: str) -> bool:
    """Whether an option that lmtpd does not implement changes what happens to mail, perhaps only that of a service."""
    options = CHANGING_OPTIONS.split()
    return name in options or name.partition("_")[2] in options


def similar_option(name: str) -> str:
    """The option whose name is most similar to that of an unknown one; "" if none is similar."""
    import difflib

    known = [*Config.table(), *CHANGING_OPTIONS.split(), *OTHER_OPTIONS.split()]
    return next(iter(difflib.get_close_matches(name, known, 1, SIMILARITY_MINIMUM)), "")


def default_partition(config: Config, settings: dict[str, tuple[str, str]], service: str, file: str) -> str:
    """The directory of all Maildirs: the partition, or the beginning of maildir_path. Raises ConfigError."""
    if "p" not in template_variables(config.maildir_path):
        return os.path.dirname(config.maildir_path.partition("%")[0])
    names = [name for name in settings if name.startswith("partition-")]
    name = f"partition-{config.defaultpartition.lower() or 'default'}"
    if len(names) == 1 and not config.defaultpartition:
        name = names[0]
    setting = settings.get(f"{service}_{name}") or settings.get(name)
    if not setting:
        raise ConfigError(f"{file}: {name} must be set; add a line '{name}: /path/to/the/maildirs'")
    return parsed(as_path, name, setting)


def parsed(parse: Callable[[str], T], name: str, setting: tuple[str, str]) -> T:
    """The value of a setting, which is ("text", "file:line"). Raises ConfigError."""
    value, where = setting
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {name}: {value!r} {error}") from None


def read_settings(file: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """The settings of a file and the files that it includes, as {name: (value, "file:line")}, and a list of the files.

    Raises ConfigError.
    """
    settings: dict[str, tuple[str, str]] = {}
    seen: list[str] = []

    def read(name: str) -> None:
        real = os.path.realpath(name)
        if real in seen:
            raise ValueError("is included twice")
        seen.append(real)
        for where, key, value in read_lines(name):
            if key == "@include":
                included = os.path.join(os.path.dirname(name), value)
                attempt(included, f"{where}: {included}")
            elif key in settings:
                raise ConfigError(f"{where}: {key} is set already at {settings[key][1]}; remove one of the two")
            else:
                settings[key] = value, where

    def attempt(name: str, where: str) -> None:
        try:
            read(name)
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None

    attempt(file, file)
    return settings, seen


def read_lines(file: str) -> Iterator[tuple[str, str, str]]:
    """Each setting in a file, as ("file:line", key, value). Raises ConfigError and OSError."""
    with open(file, "rb") as stream:
        lines = enumerate(stream.read().split(LF), 1)
    for number, physical_line in lines:
        line = physical_line
        while line.endswith(b"\\"):
            line = line[:-1] + next(lines, (0, b""))[1]
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        where = f"{file}:{number}"
        if b"\0" in line:
            raise ConfigError(f"{where}: there is a NUL octet")
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: is not UTF-8 text") from None
        key, colon, value = text.partition(":")
        is_key = key.isascii() and key.translate(OPTION_PUNCTUATION).isalnum()
        key, value = key.lower(), value.strip()
        if not colon or not (is_key or key == "@include"):
            raise ConfigError(f"{where}: {text!r} is not of the form 'option: value'")
        if not value:
            raise ConfigError(f"{where}: {key} has no value; remove the line to get the default")
        yield where, key, value


# ======================================================================
# Logging
#
# Owns where a log line goes and its form: "event key=value ...".
# Must not know what happened.
# ======================================================================

LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG = 3, 4, 6, 7  # syslog(3)
SYSLOG_SOCKET = "/dev/log"
FIELD_LIMIT = 1000  # characters of a value; syslog(3) may lose lines of more than 8 KiB
BARE = frozenset(map(chr, range(33, 127))) - frozenset('"=\\')  # characters that need no quotes in a value


class Log:
    """One line for each event: to the journal, else to syslog(3), else to standard error."""

    def __init__(self) -> None:
        self.debugging = False
        self._emit: Callable[[int, str], object] = to_stderr
        self._context: dict[str, object] = {}
        self._logged: set[str] = set()

    def open(self, prefix: str = "", facility: str = "mail", debugging: bool = False) -> None:
        """Chooses where lines go, see sd-daemon(3) and syslog(3). It may be called again."""
        self.debugging = debugging
        if stderr_is_journal():
            self._emit = to_journal
        elif os.path.exists(SYSLOG_SOCKET):
            import syslog

            syslog.openlog(f"{prefix}/lmtpd" if prefix else "lmtpd", syslog.LOG_PID, FACILITIES[facility])
            self._emit = syslog.syslog
        else:
            self._emit = to_stderr

    def send_to(self, emit: Callable[[int, str], object]) -> None:
        """Sends lines to a function, which takes the priority of syslog(3) and the line."""
        self._emit = emit

    def context(self, **fields: object) -> LogContext:
        """A "with" block in which every line has these fields."""
        return LogContext(self._context, fields)

    def error(self, event: str, **fields: object) -> None:
        """Logs what the administrator must act on."""
        self._line(LOG_ERR, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Logs what the administrator may have to act on."""
        self._line(LOG_WARNING, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Logs what happened."""
        self._line(LOG_INFO, event, fields)

    def debug(self, event: str, **fields: object) -> None:
        """Logs what helps to find a fault, if the option debug is on."""
        if self.debugging:
            self._line(LOG_DEBUG, event, fields)

    def warning_once(self, event: str, **fields: object) -> None:
        """Logs a warning, unless this process has logged the event before."""
        if event not in self._logged:
            self._logged.add(event)
            self.warning(event, **fields)

    def traceback(self, event: str, **fields: object) -> None:
        """Logs an event, and the traceback of the exception that is being handled."""
        self._line(LOG_ERR, event, fields)
        error = sys.exc_info()[1]
        try:
            import traceback
        except (ImportError, OSError):  # no descriptor is left, or the user may not read Python's files
            self._line(LOG_ERR, "traceback", {"line": repr(error)})
            return
        for line in traceback.format_exc().splitlines():
            self._line(LOG_ERR, "traceback", {"line": line})

    def startup_error(self, event: str, **fields: object) -> None:
        """Logs why the program does not start, and writes it to standard error for the person at a terminal."""
        self._line(LOG_ERR, event, fields)
        if self._emit not in (to_stderr, to_journal):
            to_stderr(LOG_ERR, self._format(event, fields))

    def _line(self, level: int, event: str, fields: dict[str, object]) -> None:
        self._emit(level, self._format(event, fields))

    def _format(self, event: str, fields: dict[str, object]) -> str:
        fields = {**self._context, **fields}
        texts = ((key, value if isinstance(value, str) else text_of(value)) for key, value in fields.items())
        return " ".join([event, *[f"{key}={quoted(text)}" for key, text in texts]])


class LogContext:
    """See Log.context(). Every log line has the fields until the block ends."""

    def __init__(self, context: dict[str, object], fields: dict[str, object]) -> None:
        self._context, self._fields = context, fields

    def __enter__(self) -> None:
        self._context.update(self._fields)

    def __exit__(self, *_: object) -> None:
        for name in self._fields:
            del self._context[name]


def text_of(value: object) -> str:
    """The value of a log field as text; an error of the system as "path: reason (as uid 1000)", as far as it is known.

    The user id is there if the error has passed a PathInErrors.
    """
    if not isinstance(value, OSError) or not value.strerror:
        return str(value)
    names = [os.fsdecode(name) for name in (value.filename, value.filename2) if name]
    path = f"{' to '.join(names)}: " if names else ""
    user = getattr(value, "uid", None)
    return f"{path}{value.strerror}" + ("" if user is None else f" (as uid {user})")


def with_path(path: str, error: Exception) -> str:
    """The text of an error, see text_of(), with that path if the error names none."""
    return text_of(error) if getattr(error, "filename", None) else f"{path}: {text_of(error)}"


def quoted(value: str) -> str:
    """The value of a log field as short printable ASCII, in quotes if it could be taken for anything else."""
    if len(value) > FIELD_LIMIT:
        value = value[:FIELD_LIMIT] + "..."
    if value and BARE.issuperset(value):
        return value
    escaped = ascii(f'{value}"')[1:-2]  # the added quote makes ascii() take the other kind around it
    return '"' + escaped.replace("\\'", "'").replace('"', '\\"') + '"'


def to_stderr(_level: int, line: str) -> None:
    """Writes a line for a person."""
    write_to_stderr(f"lmtpd[{os.getpid()}]: {line}\n")


def to_journal(level: int, line: str) -> None:
    """Writes a line for the journal, see sd-daemon(3)."""
    write_to_stderr(f"<{level}>{line}\n")


def write_to_stderr(line: str) -> None:
    """Writes a line. An error is ignored: a log that cannot be written must not stop the mail."""
    try:
        os.write(2, line.encode("ascii"))
    except OSError:
        return


def stderr_is_journal() -> bool:
    """Whether standard error is a stream to the journal. Source: systemd.exec(5), JOURNAL_STREAM."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def stdout_is_journal() -> bool:
    """Whether standard output is a stream to the journal, too, and so no LMTP client."""
    try:
        return stderr_is_journal() and os.path.sameopenfile(1, 2)
    except OSError:
        return False


def fill_standard_descriptors() -> None:
    """Opens /dev/null as standard input and output if they are closed, so that no other file gets their numbers."""
    for fd in (0, 1):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def keep_stderr_from_client() -> None:
    """Replaces standard error by /dev/null if it is closed or the client's connection. A terminal is kept."""
    if stderr_is_journal():
        return  # the journal is never a client
    try:
        if os.isatty(2) or not any(os.path.sameopenfile(2, fd) for fd in (0, 1)):
            return
    except OSError:
        pass  # one of them is closed
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if null != 2:
        os.dup2(null, 2)
        os.close(null)


log = Log()


# ======================================================================
# Replies
#
# Owns replies and their form on the wire.
# Must not know when they are given.
# ======================================================================

REPLY_LINE_LIMIT = 512  # octets with CR LF, RFC 5321 section 4.5.3.1.5


class Reply:
    """A reply of the server.

    code: three digits. enhanced: the enhanced status code (RFC 2034); "" without. text: one line or more, with LF
    between them. closes: whether the connection ends with it.
    """

    __slots__ = ("_rendered", "closes", "code", "enhanced", "text")

    def __init__(self, code: int, enhanced: str, text: str, closes: bool = False) -> None:
        self.code, self.enhanced, self.text = code, enhanced, text
        self.closes = closes or code == 421
        self._rendered = b""

    def render(self, eol: bytes = CRLF) -> bytes:
        """The octets of the reply on the wire: ASCII, in lines of RFC 5321's length."""
        if eol != CRLF:
            return self._render(eol)
        self._rendered = self._rendered or self._render(eol)
        return self._rendered

    def _render(self, eol: bytes) -> bytes:
        *lines, last = self.text.split("\n")
        enhanced = f"{self.enhanced} " if self.enhanced else ""
        return b"".join(
            [
                *(reply_line(f"{self.code}-{enhanced}{line}") + eol for line in lines),
                reply_line(f"{self.code} {enhanced}{last}") + eol,
            ]
        )

    def __str__(self) -> str:
        return f"{self.code} {self.enhanced}".rstrip()


def reply_line(line: str) -> bytes:
    """The line in printable ASCII, cut to the length that a reply line may have."""
    if not (line.isascii() and line.isprintable()):
        line = ascii(line)[1:-1]
    return line.encode("ascii")[: REPLY_LINE_LIMIT - 2]


class LmtpError(Exception):
    """A command, or one recipient's delivery, has failed. The client gets the reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply)
        self.reply = reply

    def __str__(self) -> str:
        return f"{self.reply} {self.reply.text}"


TIMED_OUT = Reply(421, "4.4.2", "Timeout, closing the connection")
SESSION_TOO_LONG = Reply(421, "4.4.2", "Session or authentication time limit reached, closing the connection")
SHUTTING_DOWN = Reply(421, "4.3.2", "Shutting down, try again later")
INTERNAL_ERROR = Reply(421, "4.3.0", "Internal error, try again later")
LINE_TOO_LONG = Reply(500, "5.5.2", "Line too long")


# ======================================================================
# Stopping
#
# Owns what may end the process early: signals, timers, the shutdown file.
# Must not know connections.
# ======================================================================

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 30  # seconds that a transaction in progress gets after SIGTERM


class Interrupted(Exception):
    """A signal arrived, or the deadline passed, within Stop.interruptible()."""


class Wakeup:
    """A pipe that a signal makes readable, so that poll(2) returns. Source: signal.set_wakeup_fd().

    fd: the end to poll.
    """

    def __init__(self) -> None:
        self.fd, self._write_end = -1, -1

    def open(self) -> None:
        """Makes the pipe. A forked process calls it again, for a pipe of its own."""
        old = self.fd, self._write_end
        self.fd, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for fd in old:
            if fd >= 0:
                os.close(fd)

    def drain(self) -> None:
        """Empties the pipe."""
        try:
            os.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return


class ShutdownFile:
    """The file by which an administrator stops all deliveries on the host."""

    def __init__(self, path: str) -> None:
        self._path = path

    def notice(self) -> str:
        """The first line of the file, or a default if it is empty; "" if the file is missing or unreadable."""
        if not os.access(self._path, os.F_OK, effective_ids=True):  # cheaper than an exception
            return ""
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                return file.readline().strip() or SHUTTING_DOWN.text
        except OSError:
            return ""


class Stop:
    """How soon this process has to end, as signals tell it.

    There are three degrees, each of which includes those before. leaving: exit after the connection (SIGHUP).
    requested: exit after the transaction (SIGTERM, SIGINT). at_once: exit as soon as the message in hand is stored or
    dropped (a second SIGTERM, or GRACE seconds after the first).
    wakeup: becomes readable when a signal arrives: Wire polls it, and then calls Dialogue, which ends the session.
    shutdown_file: the administrator's notice to clients.
    """

    def __init__(self, shutdown_file: ShutdownFile) -> None:
        self.requested = self.leaving = self.at_once = False
        self.wakeup, self.shutdown_file = Wakeup(), shutdown_file
        self._may_raise = False

    def install_handlers(self) -> None:
        """Handles signals from now on."""
        signal.signal(signal.SIGTERM, self._terminate)
        signal.signal(signal.SIGINT, self._terminate)
        signal.signal(signal.SIGALRM, self._expire)
        signal.signal(signal.SIGHUP, self._hang_up)
        self.unblock()

    def unblock(self) -> None:
        """Unblocks the stop signals, with a pipe of this process's own; also in a forked process."""
        self.wakeup.open()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def interruptible(self, deadline: float = FOREVER) -> Interruptible:
        """A "with" block in which a signal, or the deadline, raises Interrupted."""
        return Interruptible(self, deadline)

    def start_raising(self, deadline: float) -> None:
        """Lets the next signal raise Interrupted, and sets the timer for the deadline."""
        self._may_raise = True
        if deadline < FOREVER:
            signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0.001))

    def stop_raising(self) -> None:
        """Ends what start_raising() began."""
        self._may_raise = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.requested:  # the line above has stopped the timer of GRACE, too
            signal.alarm(GRACE)

    def _terminate(self, *_: object) -> None:
        self.at_once = self.requested
        self.requested = True
        signal.alarm(GRACE)
        self._hang_up()

    def _hang_up(self, *_: object) -> None:
        self.leaving = True
        self._interrupt()

    def _expire(self, *_: object) -> None:
        """The one timer of the process has run out: that of GRACE, else that of a deadline."""
        if self.requested:
            self._terminate()
        else:
            self._interrupt()

    def _interrupt(self) -> None:
        if self._may_raise:
            self._may_raise = False
            raise Interrupted


class Interruptible:
    """See Stop.interruptible(): for a wait that cannot poll the wake-up pipe."""

    def __init__(self, stop: Stop, deadline: float) -> None:
        self._stop, self._deadline = stop, deadline

    def __enter__(self) -> None:
        self._stop.start_raising(self._deadline)

    def __exit__(self, *_: object) -> None:
        self._stop.stop_raising()


# ======================================================================
# Connection
#
# Owns octets in and out on two descriptors, deadlines, the ends of lines, TLS,
# the PROXY header, and who the peer is.
# Must not know LMTP.
# ======================================================================

WRITE_SIZE = 4096  # octets that a writable pipe takes without blocking, pipe(7)
OUTPUT_LIMIT = 65536  # octets that wait to be written
LINE_LIMIT = 8192  # octets of a command line with its end
VERB_LIMIT = 16  # octets of a line that is too long, of which a verb is the beginning
LINGER = 2.0  # seconds to wait for the client to close its side
PROXY_V1_LIMIT = 105  # octets of the longest header without its end
PROXY_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_V2_LOCAL, PROXY_V2_PROXY = 0x20, 0x21
PROXY_V2_FAMILIES = {1: (socket.AF_INET, 12), 2: (socket.AF_INET6, 36), 3: (socket.AF_UNIX, 216)}  # octets needed


class Socket(socket.socket):
    """A socket, which a "with" block closes."""

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Disconnected(Exception):
    """The session ends without another reply. The text says why, for the log."""


class LineTooLong(LmtpError):
    """A line was too long, and has been skipped. beginning: its first octets."""

    def __init__(self, beginning: bytes, reply: Reply = LINE_TOO_LONG) -> None:
        super().__init__(reply)
        self.beginning = beginning


class Wire:
    """The octets of a connection, on two descriptors: a socket, a pipe, a file or a terminal.

    timeout: seconds to wait for the client to read. limit: seconds for the whole connection, except a last reply; 0 for
    no limit. wakeup: a descriptor that interrupts a wait when it becomes readable. Then on_wakeup is called, which
    empties it and may raise to end the wait for good. is_socket: whether the client is at the other end of a socket.
    """

    def __init__(self, source: int, sink: int, timeout: float, limit: float, wakeup: int) -> None:
        self.on_wakeup: Callable[[], None] = lambda: None
        self.is_socket = stat.S_ISSOCK(os.fstat(source).st_mode)
        self._source, self._sink, self._wakeup = source, sink, wakeup
        self._timeout, self._start = timeout, time.monotonic()
        self.set_limit(limit)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(source, select.POLLIN)
        self._writable.register(sink, select.POLLOUT)
        for poll in (self._readable, self._writable):
            poll.register(wakeup, select.POLLIN)
        # Other processes may share a pipe or a terminal, and expect it to block.
        self._non_blocking = stat.S_ISSOCK(os.fstat(sink).st_mode)
        if self._non_blocking:
            os.set_blocking(sink, False)

    def set_limit(self, limit: float) -> None:
        """Sets the limit to so many seconds from the start; 0 for no limit."""
        self._end = self._start + limit if limit else FOREVER

    def has_input(self) -> bool:
        """Whether a read would return at once."""
        return self._wait(self._readable, 0)

    def read(self, timeout: float) -> bytes:
        """The next octets; b"" if there are none yet. Raises LmtpError when time is up, and Disconnected at the end."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise LmtpError(SESSION_TOO_LONG)
        if not self._wait(self._readable, min(timeout, left)):
            raise LmtpError(TIMED_OUT if timeout < left else SESSION_TOO_LONG)
        try:
            data = os.read(self._source, READ_SIZE)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise Disconnected(error.strerror) from None
        if not data:
            raise Disconnected("end of file")
        return data

    def write(self, data: bytearray) -> None:
        """Writes all of data, and empties it; if on_wakeup() raises, data keeps the rest. Raises Disconnected."""
        if data and not self._non_blocking:
            self._wait_to_write()
        while data:
            try:
                written = os.write(self._sink, data if self._non_blocking else data[:WRITE_SIZE])
            except BlockingIOError:
                self._wait_to_write()
                continue
            except OSError as error:
                data.clear()
                raise Disconnected(error.strerror) from None
            del data[:written]
            if data:
                self._wait_to_write()

    def linger(self) -> None:
        """Closes our side, and waits LINGER seconds. Raises Disconnected if the client closes, too.

        Closing a socket with unread input sends RST, and the client may lose the last reply.
        """
        if not stat.S_ISSOCK(os.fstat(self._sink).st_mode):
            return
        with Socket(fileno=os.dup(self._sink)) as sock:
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise Disconnected(error.strerror) from None
        self._end = FOREVER
        deadline = time.monotonic() + LINGER
        while (patience := deadline - time.monotonic()) > 0 and self._wait(self._readable, patience):
            self.read(0)

    def _wait_to_write(self) -> None:
        if not self._wait(self._writable, min(self._timeout, self._end + LINGER - time.monotonic())):
            raise Disconnected("the client does not read the replies")

    def _wait(self, poll: select.poll, timeout: float) -> bool:
        """Whether the descriptor is ready within timeout seconds. A signal calls on_wakeup(), which may raise."""
        deadline = time.monotonic() + timeout
        events = poll.poll(max(timeout, 0) * 1000)
        if len(events) == 1 and events[0][0] != self._wakeup:
            return True  # the usual case
        while ready := {fd for fd, _ in poll.poll(max(deadline - time.monotonic(), 0) * 1000)}:
            if poll is self._writable and self._sink in ready:
                return True  # the reply to finished work comes before the signal
            if self._wakeup in ready:
                self.on_wakeup()
            if ready - {self._wakeup}:
                return True
        return False


class Tls:
    """TLS as the server, on a wire. It reads and writes plaintext, as a Wire does.

    protocol, cipher, bits: those of the session. identity: the common name in the client's verified certificate; "" if
    the client has shown none. Every method raises Disconnected when TLS fails or ends.
    """

    def __init__(self, wire: Wire, context: SSLContext, timeout: float) -> None:
        """Does the handshake. timeout: seconds for all of it."""
        import ssl

        self._wire = wire
        self._errors = ssl.SSLError
        self._wants_more = ssl.SSLWantReadError
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._encrypted = bytearray()  # not sent yet; a TLS record must be sent whole
        self._ended = False
        self._shake_hands(time.monotonic() + timeout)
        self.protocol = self._tls.version() or ""
        self.cipher, _, self.bits = self._tls.cipher() or ("", "", 0)
        subject: Any = (self._tls.getpeercert() or {}).get("subject", ())
        names = [value for attributes in subject for name, value in attributes if name == "commonName"]
        self.identity = names[0] if names else ""

    def binding(self) -> bytes:
        """The channel binding tls-unique (RFC 5929 section 3); b"" where it is not defined, as for TLS 1.3."""
        if self.protocol == "TLSv1.3":
            return b""
        return self._tls.get_channel_binding("tls-unique") or b""

    def read(self, timeout: float) -> bytes:
        """See Wire.read()."""
        if self._ended:
            raise Disconnected("end of file")
        self._incoming.write(self._wire.read(timeout))
        return self.decrypted()

    def write(self, data: bytearray) -> None:
        """See Wire.write()."""
        if data:
            try:
                self._tls.write(bytes(data))
            except self._errors as error:
                raise self._failure(error) from None
            data.clear()
        self._send()

    def decrypted(self) -> bytes:
        """The octets that have arrived already; b"" for none."""
        parts = []
        try:
            while data := self._tls.read(READ_SIZE):
                parts.append(data)
        except self._wants_more:
            return b"".join(parts)
        except self._errors as error:
            if not parts:
                raise self._failure(error) from None
        if not parts:
            raise Disconnected("end of file")
        self._ended = True
        return b"".join(parts)

    def end(self) -> None:
        """Tells the client that no more octets follow (close_notify)."""
        try:
            self._tls.unwrap()
        except self._errors:
            pass  # the client has not sent its close_notify yet, and perhaps never will
        self._send()

    def _shake_hands(self, deadline: float) -> None:
        try:
            while not self._handshake_step():
                self._send()
                self._incoming.write(self._wire.read(deadline - time.monotonic()))
        except LmtpError:
            raise Disconnected("TLS: the handshake takes too long") from None
        finally:
            self._send()

    def _handshake_step(self) -> bool:
        try:
            self._tls.do_handshake()
        except self._wants_more:
            return False
        except self._errors as error:
            raise self._failure(error) from None
        return True

    def _send(self) -> None:
        self._encrypted += self._outgoing.read()
        self._wire.write(self._encrypted)

    def _failure(self, error: OSError) -> Disconnected:
        return Disconnected(f"TLS: {getattr(error, 'reason', None) or error}")


class Connection:
    """Lines and octets, buffered, on a wire that may get TLS.

    timeout: seconds that a line may take to arrive. tls_context: the settings for STARTTLS; None if there is no TLS.
    eol: the end of a line: on a socket always CR LF; elsewhere CR LF or LF, as in the first line, for the person at a
    shell. tls: None before start_tls().
    """

    def __init__(self, wire: Wire, timeout: float, tls_context: SSLContext | None = None) -> None:
        self.wire, self.tls_context = wire, tls_context
        self.tls: Tls | None = None
        self.eol = CRLF
        self._timeout = timeout
        self._stream: Wire | Tls = wire
        self._eol_decided = wire.is_socket
        self._input, self._output = bytearray(), bytearray()

    def detect_eol(self) -> None:
        """Takes the end of lines from the client's first line if it is there already, as in a file or a pipe."""
        if not self._eol_decided and self.wire.has_input():
            self._input += self.wire.read(self._timeout)
            self._find_eol(0)

    def read_line(self, limit: int = LINE_LIMIT) -> bytes:
        """The next line without its end. limit: the most octets that it may have, with its end.

        Raises LineTooLong, LmtpError if the line does not arrive in time, and Disconnected.
        """
        deadline = time.monotonic() + self._timeout
        searched = 0
        while (end := self._find_eol(searched)) < 0 and len(self._input) < limit:
            searched = max(len(self._input) - 1, 0)
            self._fill(deadline)
        if not 0 <= end <= limit - len(self.eol):
            beginning = bytes(self._input[:VERB_LIMIT])
            self._skip_line(deadline)
            raise LineTooLong(beginning)
        line = bytes(self._input[:end])
        del self._input[: end + len(self.eol)]
        return line

    def read_some(self, limit: int = READ_SIZE) -> bytes:
        """The next octets, limit at most. Raises LmtpError when none arrive in time, and Disconnected."""
        if not self._input:
            self.flush()
            data = self._stream.read(self._timeout)
            if len(data) <= limit:
                return data
            self._input += data
        data = bytes(self._input[:limit])
        del self._input[:limit]
        return data

    def read_octets(self, size: int) -> bytes:
        """Exactly size octets. Raises LmtpError when they do not arrive in time, and Disconnected."""
        deadline = time.monotonic() + self._timeout
        while len(self._input) < size:
            self._fill(deadline)
        data = bytes(self._input[:size])
        del self._input[:size]
        return data

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next size octets, in pieces as they arrive. Raises LmtpError when time is up, and Disconnected."""
        while size:
            data = self.read_some(size)
            size -= len(data)
            yield data

    def unread(self, data: bytes) -> None:
        """Puts octets back, for the next read."""
        self._input[:0] = data

    def write(self, data: bytes) -> None:
        """Writes data, at the latest before a read that has to wait (RFC 2920 section 3.2). Raises Disconnected."""
        self._output += data
        if len(self._output) > OUTPUT_LIMIT:
            self.flush()

    def flush(self) -> None:
        """Writes all that waits to be written. Raises Disconnected."""
        if self._output or self.tls:
            self._stream.write(self._output)

    def start_tls(self, context: SSLContext) -> None:
        """Begins encryption, and drops the input that came before (RFC 3207 sections 4.2 and 6).

        Raises Disconnected when the handshake fails or takes longer than the timeout.
        """
        self.flush()
        self._input.clear()
        self._stream = self.tls = Tls(self.wire, context, self._timeout)
        self._input += self.tls.decrypted()  # the first commands may arrive with the end of the handshake

    def end(self) -> None:
        """Writes all that waits, and ends TLS. Raises Disconnected."""
        self.flush()
        if self.tls:
            self.tls.end()

    def linger(self) -> None:
        """Ends the connection, and waits for the client to close its side. Raises Disconnected."""
        self.end()
        self.wire.linger()

    def _find_eol(self, start: int) -> int:
        """The index of the next end of a line, from start on; -1 if there is none. The first line decides eol."""
        if not self._eol_decided:
            newline = self._input.find(LF)
            if newline < 0:
                return -1
            self.eol = CRLF if self._input[:newline].endswith(b"\r") else LF
            self._eol_decided = True
            start = 0
        return self._input.find(self.eol, start)

    def _skip_line(self, deadline: float) -> None:
        while (end := self._find_eol(0)) < 0:
            del self._input[:-1]  # the last octet may be the CR of the line's end
            self._fill(deadline)
        del self._input[: end + len(self.eol)]

    def _fill(self, deadline: float) -> None:
        self.flush()
        self._input += self._stream.read(deadline - time.monotonic())


def load_tls_context(config: Config) -> SSLContext | None:
    """The settings for STARTTLS; None if STARTTLS is off or, as the log says, impossible."""
    problem = f"set {'tls_server_cert' if config.allowstarttls else 'allowstarttls: yes, or tls_required: no'}"
    if config.allowstarttls and config.tls_server_cert:
        try:
            return make_tls_context(config)
        except (OSError, ValueError) as error:  # ssl.SSLError among them
            problem = with_path(config.tls_server_cert, error)
    if config.allowstarttls or config.tls_required:
        log.error("STARTTLS not offered", cause=problem)
    return None


def make_tls_context(config: Config) -> SSLContext:
    """The settings for STARTTLS. Raises OSError (ssl.SSLError among them) and ValueError."""
    import ssl

    if not {"tls1_2", "tls1_3"}.intersection(config.tls_versions):
        raise ValueError("tls_versions needs tls1_2 or tls1_3")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2 if "tls1_2" in config.tls_versions else ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3 if "tls1_3" in config.tls_versions else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION  # a TLS session ends with its connection
    context.num_tickets = 0
    if config.tls_ciphers:
        context.set_ciphers(config.tls_ciphers)
    for file in files_for_tls(config):
        os.close(os.open(file, os.O_RDONLY | os.O_CLOEXEC))  # for an error that names the file
    context.load_cert_chain(config.tls_server_cert, config.tls_server_key or None, password=no_password)
    if config.tls_client_certs == "off":
        return context
    if config.tls_client_ca_file or config.tls_client_ca_dir:
        context.load_verify_locations(config.tls_client_ca_file or None, config.tls_client_ca_dir or None)
        context.verify_mode = ssl.CERT_REQUIRED if config.tls_client_certs == "require" else ssl.CERT_OPTIONAL
    elif config.tls_client_certs == "require":
        raise ValueError("tls_client_certs: require needs tls_client_ca_file or tls_client_ca_dir")
    if config.tls_crl_file:
        context.load_verify_locations(config.tls_crl_file)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def files_for_tls(config: Config) -> list[str]:
    """The files that load_tls_context() reads, but not those in tls_client_ca_dir."""
    files = (config.tls_server_cert, config.tls_server_key, config.tls_client_ca_file, config.tls_crl_file)
    return [file for file in files if file]


def no_password() -> str:
    """Keeps OpenSSL from asking for a password at a terminal. Raises ValueError."""
    raise ValueError("the private key is encrypted; a server needs one that is not")


class Peer:
    """The client, or the proxy that stands before it.

    name: for the trace header and the log. internet: whether the socket is an internet socket. address: the internet
    address; "" if it is not known.
    """

    def __init__(self, name: str, internet: bool = False, address: str = "") -> None:
        self.name, self.internet, self.address = name, internet, address

    @classmethod
    def of(cls, fd: int) -> Peer:
        """The peer of a descriptor, which need not be a socket."""
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return cls("standard input")
        with Socket(fileno=os.dup(fd)) as sock:
            return cls.of_socket(sock)

    @classmethod
    def of_socket(cls, sock: socket.socket) -> Peer:
        """The peer of a socket: its address, or its credentials on a unix socket (unix(7), SO_PEERCRED)."""
        if sock.family == socket.AF_UNIX:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # ints: pid, uid, gid
            return cls(f"unix socket, uid {int.from_bytes(credentials[4:8], sys.byteorder)}")
        try:
            return cls.at(str(sock.getpeername()[0]))
        except OSError:
            return cls("unknown", internet=True)

    @classmethod
    def at(cls, address: str) -> Peer:
        """The peer at an internet address."""
        address = address.removeprefix("::ffff:")
        return cls(f"[IPv6:{address}]" if ":" in address else f"[{address}]", True, address)


def read_proxy_header(connection: Connection, proxy: Peer) -> Peer:
    """The client that a PROXY header, version 1 or 2, names; the proxy itself for a health check.

    Source: the PROXY protocol specification. Raises LmtpError if no header arrives in time, and Disconnected if it is
    missing or malformed.
    """
    start = connection.read_octets(len(PROXY_V2_SIGNATURE))
    if start == PROXY_V2_SIGNATURE:
        version, family, high, low = connection.read_octets(4)
        address = connection.read_octets(high << 8 | low)
        return proxied_peer_v2(version, family, address, proxy)
    connection.unread(start)
    if not start.startswith(b"PROXY "):
        raise Disconnected("no PROXY header")
    return proxied_peer_v1(connection.read_line(), proxy)


def proxied_peer_v1(line: bytes, proxy: Peer) -> Peer:
    """The peer that "PROXY TCP4 source destination port port" names. Raises Disconnected."""
    try:
        _, kind, *words = line.decode("ascii").split(" ")
        if kind == "UNKNOWN":
            return proxy
        source, destination, *ports = words
        family = {"TCP4": socket.AF_INET, "TCP6": socket.AF_INET6}[kind]
        address, _ = (socket.inet_pton(family, word) for word in (source, destination))
        if len(line) > PROXY_V1_LIMIT or len(ports) != 2 or not all(as_number(port) < 65536 for port in ports):
            raise ValueError("wrong ports")
        return Peer.at(socket.inet_ntop(family, address))
    except (KeyError, ValueError, OSError):
        raise Disconnected("malformed PROXY header") from None


def proxied_peer_v2(version: int, family: int, address: bytes, proxy: Peer) -> Peer:
    """The peer that a binary header names. Raises Disconnected."""
    if version == PROXY_V2_LOCAL or (version == PROXY_V2_PROXY and family >> 4 == 0):
        return proxy
    kind, needed = PROXY_V2_FAMILIES.get(family >> 4, (0, 0))
    if version != PROXY_V2_PROXY or not needed or len(address) < needed:
        raise Disconnected("malformed PROXY header")
    if kind == socket.AF_UNIX:
        return Peer("unix socket behind a proxy", proxy.internet)
    size = 4 if kind == socket.AF_INET else 16
    return Peer.at(socket.inet_ntop(kind, address[:size]))


# ======================================================================
# Local services
#
# Owns how daemons on this host are asked over unix sockets.
# Must not know what they are asked.
# ======================================================================

SERVICE_TIMEOUT = 30  # seconds that a daemon may take to answer
BACKOFF = 10.0  # seconds between a failure and the next try
DOVECOT_ESCAPES = {"0": "\0", "1": "\1", "t": "\t", "r": "\r", "n": "\n"}


class Unavailable(Exception):
    """Something that is needed cannot be used now. The text says why, for the log and not for the client."""


class ServiceClosed(Unavailable):
    """The daemon has closed the connection. It may answer on another one."""


class ServiceTimeout(Unavailable):
    """The daemon does not answer in time."""


def connect_to_service(path: str) -> socket.socket:
    """A connection to a daemon on this host. Raises Unavailable."""
    from socket import socket as buffered_socket  # it has makefile()

    sock = buffered_socket(socket.AF_UNIX)
    # With settimeout(), connect() would fail at once while the queue of the listener is full, see unix(7).
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SERVICE_TIMEOUT.to_bytes(8, sys.byteorder) + bytes(8))
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise Unavailable(with_path(path, error)) from None
    sock.settimeout(SERVICE_TIMEOUT)
    return sock


class DovecotService:
    """A connection to one of Dovecot's daemons, whose protocols are lines of fields with tabs between them.

    Every method raises Unavailable. Source: Dovecot's documentation of its authentication protocol.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._sock = connect_to_service(path)
        self._answers = self._sock.makefile("rb")

    def say(self, *fields: str) -> None:
        """Sends a line."""
        try:
            self._sock.sendall(("\t".join(fields) + "\n").encode())
        except socket.timeout:
            raise ServiceTimeout(f"{self.path}: does not answer") from None
        except OSError as error:
            raise ServiceClosed(with_path(self.path, error)) from None

    def hear(self) -> list[str]:
        """The fields of the next line."""
        try:
            line = self._answers.readline(LINE_LIMIT * 2)
        except socket.timeout:
            raise ServiceTimeout(f"{self.path}: does not answer") from None
        except OSError as error:
            raise ServiceClosed(with_path(self.path, error)) from None
        if not line.endswith(b"\n"):
            raise ServiceClosed(f"{self.path}: the connection was closed")
        return line[:-1].decode("utf-8", "replace").split("\t")

    def close(self) -> None:
        """Ends the connection."""
        self._answers.close()
        self._sock.close()


def unescaped(value: str) -> str:
    """A field of Dovecot's protocols without its escapes."""
    first, *rest = value.split("\1")
    return first + "".join(DOVECOT_ESCAPES.get(part[:1], part[:1]) + part[1:] for part in rest)


class Stamp:
    """A file whose time tells all processes when something happened last. Errors of the file system are ignored."""

    def __init__(self, path: str) -> None:
        self._path = path

    def set(self) -> None:
        """Notes that it happens now."""
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
            os.utime(self._path)
        except OSError:
            return

    def time(self) -> float:
        """When it happened last, by time.time(); 0 if never."""
        try:
            return os.stat(self._path).st_mtime
        except OSError:
            return 0


class Backoff:
    """After a failure, do not try again for BACKOFF seconds, so that no client waits for a service that is down.

    file: tells the other processes of it, for many serve one connection each.
    """

    def __init__(self, file: str) -> None:
        self._end = 0.0
        self._stamp = Stamp(file)

    def start(self) -> None:
        """Starts the back-off."""
        self._end = time.monotonic() + BACKOFF
        self._stamp.set()

    def is_active(self) -> bool:
        """Whether it is too early for another try."""
        return time.monotonic() < self._end or 0 <= time.time() - self._stamp.time() < BACKOFF


# ======================================================================
# Addresses
#
# Owns the syntax of paths and parameters, and the user, detail and domain of a
# recipient.
# Must not know folders.
# ======================================================================

PATH_LIMIT = 900  # octets; RFC 5321 section 4.5.3.1.3 asks for 256, a header line has room for 998
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
DOT_STRING = frozenset(LETTERS + DIGITS + "!#$%&'*+-/=?^_`{|}~.")  # RFC 5322 atext, and the dot
DOMAIN = frozenset(LETTERS + DIGITS + "-._")  # the underscore is not allowed, but in use
KEYWORD = frozenset(LETTERS + DIGITS + "-")
OTHER_SPACES = dict.fromkeys((0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000), " ")  # Unicode's Zs
WHITE_SPACE = " \t\v\f" + "".join(map(chr, OTHER_SPACES))
DECIMAL = frozenset(DIGITS)
UNQUOTED = DOT_STRING | {" "}  # clients that file mail into "user+Some Folder" do not quote the space
DIVISIONS = 10  # ways to divide an address that are tried


def is_printable(text: str) -> bool:
    """Whether all characters are printable, or Unicode spaces (RFC 6531 section 3.3)."""
    return text.isprintable() or text.translate(OTHER_SPACES).isprintable()


class Address:
    """An address (Mailbox in RFC 5321 section 4.1.2). local: the local-part, unquoted. domain: "" if there is none."""

    __slots__ = ("domain", "local")

    def __init__(self, local: str, domain: str) -> None:
        self.local, self.domain = local, domain

    def __str__(self) -> str:
        local = self.local
        if not is_made_of(local, DOT_STRING):
            local = '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return f"{local}@{self.domain}" if self.domain else local


def is_made_of(word: str, alphabet: frozenset[str]) -> bool:
    """Whether the word is not empty and has only these characters, and printable ones beyond ASCII (RFC 6531)."""
    if not word.isascii():
        if not is_printable(word):
            return False
        word = word.encode("ascii", "ignore").decode("ascii") or "x"  # x: not empty
    return bool(word) and alphabet.issuperset(word)


def parse_path(argument: str) -> tuple[Address | None, str]:
    """The address in "<path> parameters", None for <>, and the parameters.

    Addresses in use that break the rules are taken, for a refusal would bounce the mail: the domain may be missing, as
    it often is in local delivery; dots may be anywhere, as in "a..b@example.com."; a space or a quoted-pair may stand
    outside of quotes; a literal may be empty, as in qmail's "#@[]". A source route is dropped.
    Raises ValueError with a text for the client. Source: RFC 5321 section 4.1.2, RFC 6531 section 3.3.
    """
    if not argument.startswith("<"):
        raise ValueError("the address must be in angle brackets")
    start = end_of_source_route(argument)
    local, end = scan_local_part(argument, start)
    domain = ""
    if argument.startswith("@", end):
        domain, end = scan_domain(argument, end + 1)
    if not argument.startswith(">", end):
        raise ValueError("the address must be followed by >")
    if not is_printable(argument[:end]):
        raise ValueError("the address has characters that are not printable")
    if len(argument[1:end].encode()) > PATH_LIMIT:
        raise ValueError("the address is too long")
    rest = argument[end + 1 :]
    if rest and not rest.startswith(" "):
        raise ValueError("a space must follow the >")
    if not local and not domain and end == 1:
        return None, rest
    if start == end or argument[start] == "@":
        raise ValueError("the address has no local part")
    return Address(local, domain), rest


def end_of_source_route(argument: str) -> int:
    """The index in "<path>" where the mailbox begins. Raises ValueError."""
    if not argument.startswith("<@"):
        return 1
    route, colon, _ = argument[1:].partition(":")
    for hop in route.split(","):
        if not colon or not hop.startswith("@") or scan_domain(f"{hop}>", 1)[1] != len(hop):
            raise ValueError("the source route is malformed")
    return len(route) + 2


def scan_local_part(argument: str, start: int) -> tuple[str, int]:
    """The local-part that begins at an index, without quotes, and the index of its end. Raises ValueError."""
    if argument.startswith('"', start):
        return scan_quoted_string(argument, start + 1)
    local, end = "", start
    while True:
        stop = first_of("@>\\", argument, end)
        if stop > end and not is_made_of(argument[end:stop], UNQUOTED):
            raise ValueError("the local part has characters that must be quoted")
        local += argument[end:stop]
        if not argument.startswith("\\", stop):
            break
        local, end = local + argument[stop + 1 : stop + 2], stop + 2
    if argument.startswith(" ", start) or argument.endswith(" ", start, stop):
        raise ValueError("the local part has a space at one of its ends")
    return local, stop


def first_of(characters: str, text: str, start: int = 0) -> int:
    """The index of the first of these characters, from start on; the length of the text if there is none."""
    end = len(text)
    for character in characters:
        if (place := text.find(character, start, end)) >= 0:
            end = place
    return end


def scan_quoted_string(argument: str, start: int) -> tuple[str, int]:
    """The content of a quoted string, and the index of its end. start: the index after the first quote.

    Raises ValueError.
    """
    characters: list[str] = []
    rest = iter(argument[start:])
    for character in rest:
        start += 1
        if character == '"':
            return "".join(characters), start
        if character == "\\":
            character = next(rest, "")
            start += 1
        characters.append(character)
    raise ValueError("the closing quote is missing")


def scan_domain(argument: str, start: int) -> tuple[str, int]:
    """The domain or address literal that begins at an index, and the index of its end. Raises ValueError."""
    if argument.startswith("[", start):
        end = argument.find("]", start) + 1
        literal = argument[start + 1 : end - 1]
        if not end or not literal.isascii() or not set(literal).isdisjoint(" \\[<>"):
            raise ValueError("the address literal is malformed")
        return argument[start:end], end
    end = argument.find(">", start)
    domain = argument[start:end]
    if end < 0 or (domain and not is_made_of(domain, DOMAIN)):
        raise ValueError("the domain is malformed")
    return domain, end


def parse_parameters(text: str) -> dict[str, str | None]:
    """ESMTP parameters " KEYWORD KEYWORD=value ..." as a dictionary, with keywords in upper case.

    Raises ValueError with a text for the client. Source: RFC 5321 section 4.1.2.
    """
    parameters: dict[str, str | None] = {}
    for word in text.split():
        keyword, equals, value = word.partition("=")
        if not KEYWORD.issuperset(keyword) or not keyword or "=" in value or bool(equals) != bool(value):
            raise ValueError("malformed parameter")
        keyword = keyword.upper()
        if keyword in parameters:
            raise ValueError(f"{keyword} is given twice")
        parameters[keyword] = value or None
    return parameters


class Recipient:
    """One way to divide a forward-path into user, detail and domain.

    user, detail: the local-part before and after a delimiter. domain: "" if it is not a part of the userid. address: as
    the client gave it. is_postmaster: whether it is the address that every host must have (RFC 5321 section 4.5.1).
    is_shared: whether the detail names a shared folder, and not one of a user.
    """

    __slots__ = ("address", "detail", "domain", "is_postmaster", "is_shared", "user")

    def __init__(self, address: Address, user: str, detail: str, domain: str, config: Config) -> None:
        self.address, self.domain = address, domain
        self.is_postmaster = user.lower() == "postmaster"
        self.user = composed(user.lower() if config.lmtp_downcase_rcpt or self.is_postmaster else user)
        self.detail = composed(detail)
        postuser = config.postuser.lower() if config.lmtp_downcase_rcpt else config.postuser
        self.is_shared = bool(detail) and self.user == postuser

    @property
    def userid(self) -> str:
        """The user's name in the mailstore."""
        return f"{self.user}@{self.domain}" if self.domain else self.user


def recipients_of(address: Address, config: Config) -> list[Recipient]:
    """The ways to divide an address, the longest user first: the user may have a delimiter in the name.

    The last one is divided at the first delimiter. A domain beyond ASCII is there in both spellings, ASCII last.
    """
    domains = [""]
    if config.virtdomains != "off" and address.domain:
        domains = domain_spellings(address.domain)
        if config.defaultdomain and not set(domains).isdisjoint(domain_spellings(config.defaultdomain)):
            domains = [""]
    local = address.local
    ends = [len(local)]
    if (first := first_of(config.recipient_delimiter, local)) < len(local):
        ends += [end for end in range(first, len(local)) if local[end] in config.recipient_delimiter][
            DIVISIONS - 2 :: -1
        ]
    return [Recipient(address, local[:end], local[end + 1 :], domain, config) for end in ends for domain in domains]


def domain_spellings(domain: str) -> list[str]:
    """A domain in lower case; with characters beyond ASCII in Unicode and in ASCII. Source: UTS 46, RFC 5891."""
    domain = domain.lower().removesuffix(".")
    if domain.isascii() and "xn--" not in domain:
        return [domain]
    try:
        import idna
    except ImportError:
        cause = "the Python package idna is missing: install python3-idna, or pip install idna"
        log.warning_once("domain has one spelling only", domain=domain, cause=cause)
        return [composed(domain)]
    try:
        encoded = idna.encode(domain, uts46=True).decode("ascii")
        return [idna.decode(encoded), encoded]
    except UnicodeError:  # idna.IDNAError among them
        return [composed(domain)]


def composed(text: str) -> str:
    """Text with characters in one way out of several that look the same: in NFC, Unicode Standard Annex 15."""
    if text.isascii():
        return text
    import unicodedata

    return unicodedata.normalize("NFC", text)


# ======================================================================
# Files
#
# Owns identities, guarded paths, drafts, and the making of durable files and
# directories.
# Must not know mail.
# ======================================================================

NAME_LIMIT = 255  # octets of a name in a file system
LINK_LIMIT = 40  # symbolic links in a path, as many as the system follows: path_resolution(7)
NAMES_MADE = itertools.count(1)
HOST = socket.gethostname().replace("/", "\\057").replace(":", "\\072")  # escaped as in maildir(5)
WRITEBACK_SIZE = 1 << 20  # octets after which the disk starts to write
SYNC_IMPOSSIBLE = (errno.EINVAL, errno.EOPNOTSUPP)  # errors of a file system that cannot sync a directory
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
EXISTING_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # the user may have put a FIFO there


class Identity:
    """A user id, group id and groups. In a "with" block the process acts with these, and with no others.

    is_current: whether the process has these ids anyway; a block changes nothing then. Blocks of one identity may be
    nested. Raises OSError, for example if lmtpd was not started as root. If the process cannot return to its own
    identity, it ends at once: nothing may go on as root or as the user. Source: credentials(7).
    """

    def __init__(self, uid: int, gid: int, groups: Sequence[int]) -> None:
        self.uid, self.gid, self._groups = uid, gid, groups
        self.is_current = (uid, gid) == (os.geteuid(), os.getegid())
        self._depth = 0
        self._before: tuple[int, int, Sequence[int]] = (-1, -1, ())

    @classmethod
    def of_process(cls) -> Identity:
        """The identity that the process has."""
        return cls(os.geteuid(), os.getegid(), ())

    def __enter__(self) -> None:
        if self.is_current:
            return
        if not self._depth:
            self._before = os.geteuid(), os.getegid(), os.getgroups()
            try:
                set_effective_ids(self.uid, self.gid, self._groups)
            except BaseException:
                if os.geteuid() != self._before[0]:  # else nothing has changed yet
                    self._restore()
                raise
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        if self.is_current:
            return
        self._depth -= 1
        if not self._depth:
            self._restore()

    def _restore(self) -> None:
        try:
            set_effective_ids(*self._before)
        except BaseException as error:
            log.error("identity not restored", cause=error)
            os._exit(os.EX_OSERR)


def set_effective_ids(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Sets the effective ids and the groups of the process. Raises OSError, also if it was not started as root."""
    try:
        os.seteuid(0)
    except PermissionError:
        text = f"cannot act as the user with the id {uid}: lmtpd was not started as root"
        raise PermissionError(errno.EPERM, text) from None
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)


class PathInErrors:
    """A "with" block in which an OSError gets a path, unless it has a full one, and the acting user's id: text_of().

    Calls with a descriptor name no path, or only the last part of it.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, OSError):
            return
        if not str(error.filename or "").startswith("/"):
            error.filename, error.filename2 = self._path, None
        if error.errno != errno.ENOENT and not hasattr(error, "uid"):  # what is missing is so for everybody
            error.uid = os.geteuid()  # type: ignore[attr-defined]


class Draft:
    """A file in a tmp/, where no reader looks, until it is linked or moved to its place.

    directory: a descriptor of the tmp/, which is closed with the draft. path: of the tmp/, for errors. identity: the
    owner of the file. Raises OSError, save for discard(). Source: maildir(5).
    """

    def __init__(self, directory: int, path: str, identity: Identity) -> None:
        self.identity = identity
        self._name = unique_name()
        self._directory = directory
        self._path_in_errors = PathInErrors(f"{path}/{self._name}")
        self._size = self._writeback_begun = 0
        try:
            with self._path_in_errors:
                self._fd = os.open(self._name, NEW_FILE, 0o666, dir_fd=directory)
        except OSError:
            os.close(directory)
            raise

    def write(self, data: bytes) -> None:
        """Appends data."""
        with self._path_in_errors:
            write_all(self._fd, data)
        self._size += len(data)
        if self._size - self._writeback_begun >= WRITEBACK_SIZE:
            # The disk starts to write while the rest arrives, and sync() has less to wait for.
            unwritten = self._size - self._writeback_begun
            os.posix_fadvise(self._fd, self._writeback_begun, unwritten, os.POSIX_FADV_DONTNEED)
            self._writeback_begun = self._size

    def read(self, offset: int, size: int) -> bytes:
        """The octets from that offset on, size at most; b"" at the end."""
        with self._path_in_errors:
            return os.pread(self._fd, size, offset)

    def copy_from(self, read: Callable[[int, int], bytes], size: int) -> None:
        """Appends size octets that a function reads, given an offset and the most octets that it may return."""
        offset = 0
        while data := read(offset, min(READ_SIZE, size - offset)):
            self.write(data)
            offset += len(data)
        if offset < size:
            with self._path_in_errors:
                raise OSError(errno.EIO, "what is copied is shorter than it was")

    def device(self) -> int:
        """The number of the file system that has the file."""
        with self.identity:
            return os.fstat(self._fd).st_dev

    def unlink(self) -> None:
        """Removes the name. Then no other process can open the file; it can only be copied."""
        with self._path_in_errors:
            os.unlink(self._name, dir_fd=self._directory)
        self._name = ""

    def is_linkable_for(self, identity: Identity) -> bool:
        """Whether the file has a name, and that owner: whether it may be linked or moved."""
        return bool(self._name) and (identity.uid, identity.gid) == (self.identity.uid, self.identity.gid)

    def sync(self) -> None:
        """Syncs the file: after it all octets are on the disk."""
        with self._path_in_errors:
            os.fsync(self._fd)

    def make_newer_than(self, timestamp: float) -> None:
        """Makes the file's time later than a timestamp, by a second at least."""
        now = time.time()
        if now < timestamp + 1:
            os.utime(self._fd, (now, timestamp + 1))

    def link(self, directory: int, name: str) -> None:
        """Gives the file a second name, in the directory with this descriptor."""
        os.link(self._name, name, src_dir_fd=self._directory, dst_dir_fd=directory, follow_symlinks=False)

    def move(self, directory: int, name: str) -> None:
        """Renames the file, into the directory with this descriptor."""
        os.rename(self._name, name, src_dir_fd=self._directory, dst_dir_fd=directory)
        self._name = ""

    def discard(self) -> None:
        """Closes the file, and removes it unless it has been moved."""
        try:
            if self._name:
                with self.identity, self._path_in_errors:
                    os.unlink(self._name, dir_fd=self._directory)
        except OSError as error:
            log.warning("draft left behind", file=self._name, cause=error)
        for fd in (self._fd, self._directory):
            close_synced(fd)


class Directory:
    """A directory on the disk, and the directories and regular files below it. Methods raise OSError.

    guarded: whether the process acts as another user, whose symbolic links are not followed, see open_directory().
    A name may have slashes; "" is the directory itself.
    """

    def __init__(self, path: str, identity: Identity) -> None:
        self.path, self.guarded = path, not identity.is_current
        self._identity = identity

    def path_of(self, name: str) -> str:
        """The path of a directory below."""
        return f"{self.path}/{name.lstrip('/')}".rstrip("/")

    def open(self, name: str) -> int:
        """A descriptor of a directory below."""
        return open_directory(self.path_of(name), self.guarded)

    def open_or_make(self, name: str) -> int:
        """A descriptor of a directory below, which is made if it is missing; its parent must exist."""
        try:
            return self.open(name)
        except FileNotFoundError:
            self.make(name)
            return self.open(name)

    def make(self, name: str) -> None:
        """Makes a directory below, durably."""
        parent, name = os.path.split(self.path_of(name))
        make_directory(parent, name, self.guarded)

    def new_draft(self, tmp: str) -> Draft:
        """A draft in a directory below, which is made if it is missing."""
        return Draft(self.open_or_make(tmp), self.path_of(tmp), self._identity)

    def subdirectories(self) -> list[str]:
        """The names of all directories in it."""
        fd = self.open("")
        try:
            with os.scandir(fd) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=not self.guarded)]
        finally:
            close_synced(fd)

    def open_file(self, directory: str, name: str, flags: int) -> int:
        """A descriptor of a regular file in a directory below. flags: of open(2)."""
        path = f"{self.path_of(directory)}/{name}"
        with PathInErrors(path):
            if self.guarded:
                place = self.open(directory)
                try:
                    fd = os.open(name, flags | EXISTING_FILE, 0o666, dir_fd=place)
                finally:
                    close_synced(place)
            else:
                fd = os.open(path, flags | EXISTING_FILE, 0o666)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.EINVAL, "not a regular file")
        return fd

    def append_to_file(self, directory: str, name: str, content: bytes) -> bool:
        """Appends to a regular file in a directory below; whether the file still had a name after that.

        A file without a name has been replaced meanwhile, and the new one does not have the content.
        """
        fd = self.open_file(directory, name, os.O_WRONLY | os.O_APPEND)
        try:
            with PathInErrors(f"{self.path_of(directory)}/{name}"):
                write_all(fd, content)
                return os.fstat(fd).st_nlink > 0
        finally:
            os.close(fd)

    def add_file(self, directory: str, name: str, content: bytes) -> None:
        """Makes a file in a directory below, all at once, unless the name is taken. Only its content is synced."""

        def link(draft: Draft, place: int) -> None:
            try:
                draft.link(place, name)
            except FileExistsError:
                return
            except OSError:  # no hard links here
                if name not in os.listdir(place):
                    draft.move(place, name)

        self._put_file(directory, content, link)

    def replace_file(self, directory: str, name: str, content: bytes, newer_than: float = 0) -> None:
        """Replaces a file in a directory below, all at once. newer_than: a timestamp, earlier than the new file's."""

        def move(draft: Draft, place: int) -> None:
            draft.make_newer_than(newer_than)
            draft.move(place, name)

        self._put_file(directory, content, move)

    def _put_file(self, directory: str, content: bytes, put: Callable[[Draft, int], None]) -> None:
        """Calls put() with a synced draft of the content and a descriptor of the directory, which is not synced."""
        draft = self.new_draft(f"{directory}/tmp")
        try:
            draft.write(content)
            draft.sync()
            place = self.open(directory)
            try:
                with PathInErrors(self.path_of(directory)):
                    put(draft, place)
            finally:
                close_synced(place)
        finally:
            draft.discard()


def open_directory(path: str, guarded: bool) -> int:
    """A descriptor of the directory at an absolute path. Raises OSError.

    guarded: a symbolic link is followed only in directories that belong to root, and that only root can write to; so
    are the links to which it leads.
    """
    if not guarded:
        return os.open(path, OPEN_DIRECTORY)
    names = path.split("/")[::-1]  # those that follow, the next one last
    where, links = "", 0
    fd = os.open("/", OPEN_DIRECTORY)
    try:
        while any(names):
            if not (name := names.pop()):
                continue
            # Passing through a directory needs no right to read it.
            flags = OPEN_DIRECTORY | os.O_NOFOLLOW | (os.O_PATH if any(names) else 0)
            try:
                with PathInErrors(f"{where}/{name}"):
                    below = os.open(name, flags, dir_fd=fd)
                where = f"{where}/{name}"
            except NotADirectoryError:
                links += 1
                target = target_of_trusted_link(fd, name, where, links)
                names += target.split("/")[::-1]
                if not target.startswith("/"):
                    continue
                where, below = "", os.open("/", OPEN_DIRECTORY)
            os.close(fd)
            fd = below
    except (OSError, ValueError):  # ValueError: a NUL in the path
        os.close(fd)
        raise
    return fd


def target_of_trusted_link(directory: int, name: str, where: str, number: int) -> str:
    """The target of a symbolic link that may be followed. Raises OSError for one that may not, and for what is no link.

    directory, where: the descriptor and the path of its directory. number: how many links have been followed, this one
    included.
    """
    with PathInErrors(f"{where}/{name}"):
        try:
            target = os.readlink(name, dir_fd=directory)
        except OSError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        status = os.fstat(directory)
        if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            text = "a symbolic link that others than root can make is not followed; put the directory itself there"
            raise OSError(errno.ELOOP, text)
        if number > LINK_LIMIT:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def make_directories(path: str, guarded: bool) -> None:
    """Makes a directory and its missing parents, durably. Raises OSError."""
    if os.path.isdir(path):
        sync_own_parents(path, guarded)
        return
    parent, name = os.path.split(path)
    make_directories(parent, guarded)
    make_directory(parent, name, guarded)


def sync_own_parents(path: str, guarded: bool) -> None:
    """Makes an existing directory and its parents durable, as far as they belong to the acting user.

    Another process may have just made them, and not synced them yet. Raises OSError.
    """
    while path != "/" and os.stat(path).st_uid == os.geteuid():
        path = os.path.dirname(path)
        try:
            fd = open_directory(path, guarded)
        except PermissionError:
            return  # the acting user cannot have made anything in there
        try:
            with PathInErrors(path):
                sync_directory(fd)
        finally:
            close_synced(fd)


def nearest_directory(path: str) -> str:
    """The path, or the nearest parent of it that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def make_directory(parent: str, name: str, guarded: bool) -> None:
    """Makes a directory in an existing one, durably. Raises OSError."""
    fd = open_directory(parent, guarded)
    try:
        with PathInErrors(f"{parent}/{name}"):
            try:
                os.mkdir(name, 0o777, dir_fd=fd)
            except FileExistsError:
                pass  # another process has made it, and perhaps not synced it yet
            sync_directory(fd)
    finally:
        close_synced(fd)


def sync_directory(fd: int) -> None:
    """Makes the names in a directory durable. Raises OSError, unless the file system has no means for that (CIFS)."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in SYNC_IMPOSSIBLE:
            raise


def close_synced(fd: int) -> None:
    """Closes a file or directory that needs no sync any more, so that an error of close(2) says nothing."""
    try:
        os.close(fd)
    except OSError:
        return


def write_all(fd: int, data: bytes) -> None:
    """Writes all of data to a file. Raises OSError, also for a write that takes nothing and gives no error."""
    while data:
        written = os.write(fd, data)
        if not written:
            raise OSError(errno.EIO, "nothing was written")
        data = data[written:]


def unique_name() -> str:
    """A name that no other message on this host has or will have: time, process, count, host. Source: maildir(5)."""
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    return f"{seconds}.M{microseconds:06d}P{os.getpid()}Q{next(NAMES_MADE)}.{HOST}"


# ======================================================================
# Message
#
# Owns what comes after DATA or BDAT: decoding, limits, header and body, trace
# and added fields.
# Must not know who gets it.
# ======================================================================

MEMORY_LIMIT = 256 * 1024  # octets of a message that is kept in memory, and of a header that is parsed
OBSOLETE_SPACE = 64  # octets of white space before a field's colon, RFC 5322 section 4.5.8
FIRST_LINE_LIMIT = 1024  # octets of the first line that are examined: is it a field?
FIELD_NAME = frozenset(set(range(33, 127)) - {ord(":")})  # RFC 5322 section 2.2
EIGHT_BIT_TO_X = bytes(range(128)) + b"X" * 128

NUL_IN_MESSAGE = Reply(554, "5.6.0", "The message contains a NUL octet")
EIGHT_BIT_HEADER = Reply(554, "5.6.0", "The message has 8-bit octets in its header")
TOO_LARGE = Reply(552, "5.3.4", "The message is larger than this server takes")


class DotDecoder:
    """Decodes a message that DATA sends: the dots, and the end. The octets may be cut anywhere.

    Only the line "." ends the message, and lines end as in the whole session. With CR LF, a dot after a bare LF or a
    bare CR ends nothing, which prevents SMTP smuggling.
    ended: whether the last line has arrived. rest: the octets after it.
    Source: RFC 5321 sections 2.3.8, 4.1.1.4 and 4.5.2.
    """

    def __init__(self, eol: bytes = CRLF) -> None:
        self.ended = False
        self.rest = b""
        self._eol = eol
        self._dot, self._end = eol + b".", eol + b"." + eol
        self._held = eol  # as if a line ended before the message
        self._skip = 1

    def decode(self, data: bytes) -> bytes:
        """The octets of the message in data, with LF at the end of lines."""
        data = self._held + data
        dot = data.find(self._dot)
        end = data.find(self._end, dot) if dot >= 0 else -1
        if end >= 0:
            self.ended = True
            self.rest = data[end + len(self._end) :]
            data = data[: end + len(self._eol)]
        else:
            end = len(data) - overlap(data, self._end)
            self._held = data[end:]
            data = data[:end]
        if dot >= 0:
            data = data.replace(self._dot, self._eol)
        decoded = with_lf(data, self._eol)
        if self._skip and decoded:
            self._skip, decoded = 0, decoded[1:]
        return decoded


def with_lf(data: bytes, eol: bytes) -> bytes:
    """data.replace(eol, LF), in two thirds of the time if data has no lone CR."""
    if eol == LF:
        return data
    without_cr = data.replace(b"\r", b"")
    has_lone_cr = data.count(CRLF) < len(data) - len(without_cr)
    return data.replace(CRLF, LF) if has_lone_cr else without_cr


def overlap(data: bytes, pattern: bytes) -> int:
    """The number of octets at the end of data that may be the beginning of the pattern."""
    for size in range(len(pattern) - 1, 0, -1):
        if data.endswith(pattern[:size]):
            return size
    return 0


class ChunkDecoder:
    """Decodes BDAT chunks, with LF at the end of lines. The octets may be cut anywhere. Source: RFC 3030."""

    def __init__(self, eol: bytes = CRLF) -> None:
        self._eol = eol
        self._held = b""

    def decode(self, data: bytes) -> bytes:
        """The octets of the message in data. A CR at the end is kept back until the next octet has come."""
        data = self._held + data
        end = len(data) - overlap(data, self._eol)
        self._held = data[end:]
        return with_lf(data[:end], self._eol)

    def rest(self) -> bytes:
        """The octets of the message that were kept back, after the last chunk."""
        return self._held


class Header:
    """The header section of a message. octets: all of it, with the end of its last line, without the empty line.

    Names of fields are given in lower case.
    """

    __slots__ = ("_lowered", "octets")

    def __init__(self, octets: bytes) -> None:
        self.octets = octets
        self._lowered = b""

    @classmethod
    def of(cls, content: bytes) -> Header:
        """The header section of a message: up to an empty line, else all; empty if it does not begin with a field."""
        first_line, _, _ = content[:FIRST_LINE_LIMIT].partition(LF)
        if not may_begin_header(first_line):
            return NO_HEADER
        ends = [end for end in (content.find(b"\n\n"), content.find(b"\n\r\n")) if end >= 0]
        return cls(content[: min(ends) + 1] if ends else content)

    def body_of(self, name: bytes) -> str | None:
        """The body of the first field of that name, with single spaces; None if it is missing."""
        for start, end in self.spans(name):
            body = self.octets[start:end].partition(b":")[2]
            return b" ".join(body.split()).decode("utf-8", "backslashreplace")
        return None

    def without(self, name: bytes) -> bytes:
        """The octets without the fields of that name."""
        kept, after = [], 0
        for start, end in self.spans(name):
            kept.append(self.octets[after:start])
            after = end
        return b"".join([*kept, self.octets[after:]])

    def spans(self, name: bytes) -> Iterator[tuple[int, int]]:
        """Where each field of that name begins and ends."""
        lowered = self._lowered = self._lowered or LF + self.octets.lower()  # lowered[n] is the octet before octets[n]
        wanted = LF + name
        start = lowered.find(wanted)
        while start >= 0:
            end = start + len(wanted)
            if lowered[end : end + OBSOLETE_SPACE].lstrip(b" \t").startswith(b":"):
                end = self._end_of_field(start)
                yield start, end
            start = lowered.find(wanted, end)

    def _end_of_field(self, start: int) -> int:
        """Where the field that begins there ends, with its folded lines."""
        end = self.octets.find(LF, start) + 1
        while end and self.octets[end : end + 1] in (b" ", b"\t"):
            end = self.octets.find(LF, end) + 1
        return end or len(self.octets)


NO_HEADER = Header(b"")


def may_begin_header(line: bytes) -> bool:
    """Whether a header section may begin with this line: a field (RFC 5322 section 2.2), or mbox's From line."""
    name, colon, _ = line.partition(b":")
    name = name.rstrip(b" \t")
    return bool(colon and name and FIELD_NAME.issuperset(name)) or line.startswith((b"From ", b">From "))


class Message:
    """A message as it is stored: in memory while it is small, else in a draft.

    header: the header section, with the added fields, as far as it lies in the first MEMORY_LIMIT octets. body_offset:
    the index after it and the empty line. size: octets. lines: LFs without a CR, to which an IMAP server adds one.
    message_id: the Message-ID as text. has_message_id: whether the client sent it. date: the Date that the client sent.
    content: all octets; b"" if they are not in memory. draft: a file with all octets; None while there is none.
    """

    __slots__ = (
        *("_beginning", "_original", "body_offset", "content", "date", "draft", "has_message_id", "header", "lines"),
        *("message_id", "size"),
    )

    def __init__(self) -> None:
        self.header = NO_HEADER
        self.body_offset = self.size = self.lines = 0
        self.message_id, self.has_message_id, self.date = "", False, ""
        self.content = b""
        self.draft: Draft | None = None
        self._original: Message | None = None  # for a variant: what follows its beginning
        self._beginning = b""

    def with_field(self, field: bytes) -> Message:
        """A variant with a field after the first one, Return-Path. It reads this message, and has no draft yet.

        field: with the LF at its end.
        """
        start = self.header.octets.index(LF) + 1
        variant = Message()
        variant._original, variant._beginning = self, self.header.octets[:start] + field
        variant.header = Header(variant._beginning + self.header.octets[start:])
        variant.body_offset, variant.size = self.body_offset + len(field), self.size + len(field)
        variant.lines = self.lines + count_of_lf(field)
        variant.message_id, variant.has_message_id, variant.date = self.message_id, self.has_message_id, self.date
        return variant

    def read(self, offset: int, size: int) -> bytes:
        """The octets from that offset on, size at most; b"" at the end. Raises OSError."""
        if self._original:
            beginning = self._beginning[offset : offset + size]
            if len(beginning) == size:
                return beginning
            start = offset + len(beginning) - self.size + self._original.size
            return beginning + self._original.read(start, size - len(beginning))
        if self.content or not self.draft:
            return self.content[offset : offset + size]
        return self.draft.read(offset, size)

    def discard(self) -> None:
        """Frees the octets, and removes the draft if it has not become a delivered message."""
        self.content = b""
        if self.draft:
            self.draft.discard()
            self.draft = None


class Spool:
    """Writes a large message to a draft. Methods raise OSError.

    drafts: files on different file systems. When a write fails, the next file gets a copy, and the write again.
    """

    def __init__(self, drafts: Iterator[Draft]) -> None:
        self._drafts = drafts
        self.draft = next(drafts)
        self._size = 0

    def write(self, data: bytes) -> None:
        """Appends data."""
        draft = self.draft
        while True:
            try:
                if draft is not self.draft:
                    draft.copy_from(self.draft.read, self._size)
                draft.write(data)
                break
            except OSError as error:
                if draft is not self.draft:
                    draft.discard()
                another = next(self._drafts, None)
                if not another:
                    raise
                log.warning("spooling elsewhere", cause=error)
                draft = another
        if draft is not self.draft:
            self.draft.discard()
            self.draft = draft
        self._size += len(data)


class Incoming:
    """A message that is arriving: what comes after DATA or BDAT, with the trace and added fields before it.

    trace: the trace header fields. drafts: see Spool.
    message: the message, as far as it has arrived. wire_size: octets received, with CR LF for each end of a line.
    refusal: the reply to a message that must not be delivered; None while there is no reason. failure: why it could not
    be spooled; None if it could.
    """

    def __init__(self, trace: bytes, config: Config, drafts: Iterator[Draft]) -> None:
        self.message = Message()
        self.refusal: Reply | None = None
        self.failure: OSError | None = None
        self.wire_size = 0
        self._trace, self._config, self._drafts = trace, config, drafts
        self._received = bytearray()
        self._spool: Spool | None = None
        self._ends_in_cr = False

    def write(self, data: bytes) -> None:
        """Takes the next octets, with LF at the end of lines. Never raises: an error becomes refusal or failure."""
        if self.refusal or self.failure or not data:
            return
        line_ends = count_of_lf(data)
        self.wire_size += len(data) + line_ends
        if 0 < self._config.maxmessagesize < self.wire_size:
            self._refuse(TOO_LARGE)
        elif b"\0" in data:
            self._refuse(NUL_IN_MESSAGE)
        elif self._spool:
            self._append(self._spool, data, line_ends)
        else:
            self._received += data
            if len(self._received) > MEMORY_LIMIT:
                self._start_spool()

    def complete(self) -> None:
        """Ends the message: no more octets follow. Never raises: an error becomes refusal or failure."""
        if self.refusal or self.failure:
            return
        if self._spool:
            try:
                self._spool.draft.sync()
            except OSError as error:
                self._fail(error)
            return
        message = self.message
        message.content = content = self._with_added_fields()
        message.size, message.lines = len(content), count_of_lf(content) - content.count(CRLF)

    def discard(self) -> None:
        """Frees the octets, and removes the draft if it has not become a delivered message."""
        self._received.clear()
        self.message.discard()

    def _refuse(self, reply: Reply) -> None:
        self.refusal = reply
        self.discard()

    def _fail(self, error: OSError) -> None:
        log.error("spooling failed", cause=error)
        self.failure = error
        self.discard()

    def _start_spool(self) -> None:
        """Moves the received octets, now too many for memory, into a draft. An error becomes refusal or failure."""
        content = self._with_added_fields()
        if self.refusal:
            return
        try:
            self._spool = Spool(self._drafts)
        except OSError as error:
            self._fail(error)
            return
        self._append(self._spool, content, count_of_lf(content))

    def _append(self, spool: Spool, data: bytes, line_ends: int) -> None:
        """Writes data to the spool, and counts octets and lines. line_ends: LFs in data. An error becomes failure."""
        message = self.message
        if b"\r" in data or self._ends_in_cr:
            line_ends -= data.count(CRLF) + (self._ends_in_cr and data.startswith(LF))
        message.draft = spool.draft
        try:
            spool.write(data)
        except OSError as error:
            self._fail(error)
            return
        message.draft = spool.draft
        message.size += len(data)
        message.lines += line_ends
        self._ends_in_cr = data.endswith(b"\r")

    def _with_added_fields(self) -> bytes:
        """The octets received so far, with the trace and missing fields before them; b"" if they are refused."""
        received = bytes(self._received)
        self._received.clear()
        header = Header.of(received)
        body = received[len(header.octets) :]
        if not header.octets.isascii():
            if self._config.reject8bit:
                self._refuse(EIGHT_BIT_HEADER)
                return b""
            if self._config.munge8bit:
                header = Header(header.octets.translate(EIGHT_BIT_TO_X))
        message = self.message
        head = [self._trace, *self._added_fields(header), header.without(b"return-path")]
        if body and not header.octets and not body.startswith(LF):
            body = LF + body
        message.header = Header(b"".join(head))
        message.body_offset = len(message.header.octets) + (1 if body.startswith(LF) else 2 if body else 0)
        return message.header.octets + body

    def _added_fields(self, header: Header) -> list[bytes]:
        """The fields Message-ID and Date, as far as the header does not have them. Sets both in the message."""
        message, missing = self.message, []
        if (message_id := header.body_of(b"message-id")) is not None:
            message.message_id, message.has_message_id = message_id, True
        else:
            message.message_id = f"<lmtpd.{time.time_ns()}.{os.getpid()}@{self._config.servername}>"
            missing.append(f"Message-ID: {message.message_id}\n".encode())
        if (date := header.body_of(b"date")) is not None:
            message.date = date
        else:
            missing.append(f"Date: {date_time()}\n".encode())
        return missing


def count_of_lf(data: bytes) -> int:
    """data.count(LF), in a sixth of the time."""
    return len(data) - len(data.replace(LF, b""))


def date_time() -> str:
    """The time now, as RFC 5322 section 3.3 writes it."""
    return time.strftime("%a, %d %b %Y %H:%M:%S %z")  # in English: this program never sets a locale


class Origin:
    """Where a message comes from, for its trace header fields.

    client: the name given with LHLO. peer: the client's address. session: the session's id. trusted: whether the client
    may deliver without authentication. user: the authenticated user; "" if there is none. tls: None without TLS.
    utf8: whether SMTPUTF8 was asked for.
    """

    def __init__(
        self, client: str, peer: str, session: str, trusted: bool, user: str, tls: Tls | None, utf8: bool
    ) -> None:
        self.client, self.peer, self.session = client, peer, session
        self.trusted, self.user, self.tls, self.utf8 = trusted, user, tls, utf8

    def protocol(self) -> str:
        """The protocol by RFC 3848 and RFC 6531 section 4.3, with the cipher as a comment."""
        letters = ("S" if self.tls else "") + ("A" if self.trusted or self.user else "")
        tls = self.tls
        cipher = f" ({tls.protocol} with cipher {tls.cipher} ({tls.bits} bits))" if tls else ""
        return f"{'UTF8' if self.utf8 else ''}LMTP{letters}{cipher}"


def trace_header(origin: Origin, reverse_path: Address | None, recipient: Address | None, config: Config) -> bytes:
    """The fields Return-Path and Received (RFC 5321 section 4.4).

    reverse_path: the sender, None for <>. If it has no domain, servername is added. recipient: None for several.
    """
    sender = "" if reverse_path is None else str(reverse_path)
    if reverse_path and not reverse_path.domain:
        sender += f"@{config.servername}"
    bits = origin.tls.bits if origin.tls else 0
    authenticated = f" (authenticated user={origin.user} bits={bits})" if origin.user else ""
    product = f" ({PRODUCT})" if config.serverinfo == "on" else ""
    for_recipient = f"\n\tfor <{recipient}>" if recipient else ""
    return (
        f"Return-Path: <{sender}>\n"
        f"Received: from {origin.client} ({origin.peer}){authenticated}\n"
        f"\tby {config.servername}{product} with {origin.protocol()} id {origin.session}{for_recipient};\n"
        f"\t{date_time()}\n"
    ).encode()


# ======================================================================
# Fields
#
# Owns the syntax of the bodies of header fields: folding, encoded words, charsets,
# parameters, addresses, dates.
# Must not know what a field is for.
# ======================================================================

CHARSETS: dict[str, str] = {}  # Python's codec for the name of a charset; see codec_of()
NOT_CHARSETS = ("base64_codec", "bz2_codec", "hex_codec", "mbcs", "quopri_codec", "rot_13", "uu_codec", "zlib_codec")
OTHER_CHARSETS = {  # those that Python does not know, and those in whose name mail has a larger charset
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    **dict.fromkeys(("euc_kr", "ks_c_5601_1987"), "cp949"),
    **dict.fromkeys(("iso_8859_8_e", "iso_8859_8_i"), "iso8859_8"),
    "koi8_u": "koi8_u",
    "shift_jis": "cp932",
    "windows_874": "cp874",
}
PARAMETER_SPECIALS, ADDRESS_SPECIALS = '()"\\;', '()"\\[]<>@,;:'  # characters that separate lexemes
NOT_IN_TOKEN = frozenset('()<>@,;:\\"/[]?= ')  # RFC 2045 section 5.1
CLOSING = {"(": ")", '"': '"', "[": "]"}
PARAMETERS_LIMIT = 100  # parameters of a field; more are left out
HEXADECIMAL = frozenset(b"0123456789abcdefABCDEF")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
ZONES = {"edt": -240, "est": -300, "cdt": -300, "cst": -360, "mdt": -360, "mst": -420, "pdt": -420, "pst": -480}


def raw_text(body: bytes) -> str:
    """The body of a header field as it stands: unfolded, without white space at its ends (RFC 5322 section 2.2.3).

    Octets that are not UTF-8 become surrogates (PEP 383), here and in all text of this section.
    """
    return unfolded(body).decode("utf-8", "surrogateescape")


def unstructured(body: bytes) -> str:
    """The body of a header field as people read it: as raw_text() has it, with encoded words decoded."""
    octets = unfolded(body)
    if b"=?" in octets:
        return with_words_decoded(octets).strip(" \t\r\n")
    return octets.decode("utf-8", "surrogateescape")


def unfolded(body: bytes) -> bytes:
    """The body of a header field without the ends of its lines, and without white space at its own ends.

    A tab after the end of a line becomes a space, for what is compared is written with spaces.
    """
    body = body.strip()
    return body.replace(CRLF, LF).replace(b"\n\t", b" ").replace(LF, b"") if LF in body else body


def with_words_decoded(octets: bytes) -> str:
    """An unfolded body as text, with its encoded words decoded (RFC 2047 section 6).

    The white space between two of them is left out. Adjacent words of one charset are decoded together: some programs
    divide a character. A word that cannot be decoded is left as it is.
    """
    texts: list[str] = []
    run: list[tuple[str, bytes, bytes]] = []
    for plain, word in encoded_words(octets):
        if run and word and not plain.strip():
            plain = b""
        if run and (plain or not word or word[0] != run[0][0]):
            texts.append(text_of_words(run))
            run = []
        texts.append(plain.decode("utf-8", "surrogateescape"))
        if word:
            run.append(word)
    return "".join(texts)


def encoded_words(octets: bytes) -> Iterator[tuple[bytes, tuple[str, bytes, bytes] | None]]:
    """Each encoded word with the octets before it; last the octets after all of them, and None.

    An encoded word is its codec, its content, and itself as it stands.
    """
    pieces = octets.split(b"?")
    plain: list[bytes] = []
    index, piece = 0, pieces[0]
    while index + 4 < len(pieces):
        word = None
        if piece.endswith(b"=") and pieces[index + 4].startswith(b"="):
            word = encoded_word(*pieces[index + 1 : index + 4])
        if word:
            yield b"?".join([*plain, piece[:-1]]), word
            plain = []
            index += 4
            piece = pieces[index][1:]
        else:
            plain.append(piece)
            index += 1
            piece = pieces[index]
    yield b"?".join([*plain, piece, *pieces[index + 1 :]]), None


def encoded_word(charset: bytes, encoding: bytes, text: bytes) -> tuple[str, bytes, bytes] | None:
    """An encoded word, as encoded_words() gives it; None if it is malformed, or its charset unknown.

    The charset may have a language (RFC 2231 section 5).
    """
    import binascii

    codec = codec_of(charset.partition(b"*")[0].decode("latin-1"))
    if not codec:
        return None
    if encoding in (b"Q", b"q"):
        content = binascii.a2b_qp(text, header=True)
    elif encoding in (b"B", b"b"):
        try:
            content = binascii.a2b_base64(text + b"==")  # the padding may be missing
        except binascii.Error:
            return None
    else:
        return None
    return codec, content, b"=?%b?%b?%b?=" % (charset, encoding, text)


def text_of_words(words: list[tuple[str, bytes, bytes]]) -> str:
    """The text of adjacent encoded words of one charset."""
    codec = words[0][0]
    try:
        return decoded(b"".join([content for _, content, _ in words]), codec)
    except UnicodeError:
        if len(words) > 1:
            return "".join([text_of_words([word]) for word in words])
        return words[0][2].decode("utf-8", "surrogateescape")


def charset_text(octets: bytes, charset: str, complete: bool = True) -> str:
    """Octets as text, by the name of their charset. If that is unknown or wrong, as UTF-8.

    complete: whether the octets are all; else a piece of a character at their end is left out.
    """
    codec = codec_of(charset)
    if codec:
        try:
            return decoded(octets, codec, complete)
        except UnicodeError:
            pass
    return octets.decode("utf-8", "surrogateescape")


def decoded(octets: bytes, codec: str, complete: bool = True) -> str:
    """Octets as text, by a codec of Python. Raises UnicodeError. complete: see charset_text()."""
    if complete:
        text = octets.decode(codec)
    else:
        import codecs

        text = codecs.getincrementaldecoder(codec)().decode(octets, False)
    if codec == "utf_7":  # the only one that may give surrogates
        text.encode()
    return text


def codec_of(charset: str) -> str:
    """Python's codec for a charset; "" if that is unknown. Python has codecs for other things than charsets, too.

    A name that a message has is never handed to Python, which would look for a module of that name.
    """
    if not CHARSETS:
        from encodings.aliases import aliases

        codecs = {codec: codec for codec in aliases.values()} | aliases
        CHARSETS.update({name: codec for name, codec in codecs.items() if codec not in NOT_CHARSETS})
        CHARSETS.update(OTHER_CHARSETS)
    return CHARSETS.get(charset.strip().lower().replace("-", "_").replace(":", "_"), "")


def lexemes(text: str, specials: str) -> Iterator[tuple[str, str]]:
    """The lexemes of a structured body (RFC 5322 section 3.2), each with its kind; comments are left out.

    A quoted string is '"' and its content, a domain literal "[" and its content, another special itself and itself,
    and the text between them "" and itself, with its white space. What is not closed takes the rest of the text.
    specials: characters; the parentheses, the quote and the backslash must be among them.
    """
    held: list[str] = []
    kind, level = "", 0  # of what is open; level: parentheses, or 1
    for is_special, piece in divided(text, specials):
        if not is_special:
            held.append(piece)
            continue
        if kind:
            level += (piece == "(" == kind) - (piece == CLOSING[kind])
            if level:
                held.append(piece)
                continue
            if kind != "(":
                yield kind, "".join(held)
            kind = ""
        else:
            if any(held):
                yield "", "".join(held)
            if piece in CLOSING:
                kind, level = piece, 1
            else:
                yield piece, piece
        held = []
    if kind != "(" and any(held):
        yield kind, "".join(held)


def divided(text: str, specials: str) -> Iterator[tuple[bool, str]]:
    """Text divided at the specials: whether a piece is a special, and itself.

    A backslash makes the next character an ordinary one, and is left out (quoted-pair, RFC 5322 section 3.2.1).
    """
    text = text.replace("\0", "")
    for special in specials:
        text = text.replace(special, f"\0{special}\0")
    pieces = iter(text.split("\0"))
    yield False, next(pieces)
    is_quoted = False
    for special, plain in zip(pieces, pieces):
        if is_quoted or special != "\\":
            yield not is_quoted, special
        is_quoted = special == "\\" and not is_quoted and not plain
        yield False, plain


class ContentType:
    """The media type of an entity (RFC 2045 section 5), or its disposition (RFC 2183).

    type, subtype: in lower case; a disposition has the subtype "". parameters: their values by their names in lower
    case, without quotes.
    """

    __slots__ = ("parameters", "subtype", "type")

    def __init__(self, kind: str, subtype: str, parameters: dict[str, str]) -> None:
        self.type, self.subtype, self.parameters = kind, subtype, parameters

    def __str__(self) -> str:
        return f"{self.type}/{self.subtype}" if self.subtype else self.type

    @classmethod
    def parse(cls, body: bytes | None, default: str = "text/plain") -> ContentType:
        """The type that the body of a Content-Type field gives. default: if it gives none, or there is no field."""
        value, parameters = value_and_parameters(body or b"")
        kind, _, subtype = value.partition("/")
        kind, subtype = kind.rstrip(), first_word(subtype)
        if is_token(kind) and is_token(subtype):
            return cls(kind, subtype, parameters)
        kind, _, subtype = default.partition("/")
        return cls(kind, subtype, {"charset": "us-ascii"} if kind == "text" else {})

    @classmethod
    def parse_disposition(cls, body: bytes | None) -> ContentType:
        """The disposition that the body of a Content-Disposition field gives; its type is "" if there is none."""
        value, parameters = value_and_parameters(body or b"")
        return cls(first_word(value), "", parameters)


def first_word(text: str) -> str:
    """The text up to the first white space; "" if there is nothing else."""
    return next(iter(text.split(None, 1)), "")


def is_token(word: str) -> bool:
    """Whether the word is a token of RFC 2045 section 5.1."""
    return bool(word) and word.isascii() and word.isprintable() and NOT_IN_TOKEN.isdisjoint(word)


def value_and_parameters(body: bytes) -> tuple[str, dict[str, str]]:
    """The value, in lower case, and the parameters of the body of a field as Content-Type is (RFC 2045 section 5.1)."""
    segments: list[list[tuple[str, str]]] = [[]]
    for kind, text in lexemes(raw_text(body), PARAMETER_SPECIALS):
        if kind != ";":
            segments[-1].append((kind, text))
        elif len(segments) <= PARAMETERS_LIMIT:
            segments.append([])
        else:
            break
    value, *rest = segments
    parameters = dict([parameter(segment) for segment in reversed(rest) if segment])  # of two the first counts
    return "".join([text for _, text in value]).strip().lower(), with_sections_joined(parameters)


def parameter(segment: list[tuple[str, str]]) -> tuple[str, str]:
    """The name, in lower case, and the value of a parameter. segment: its lexemes."""
    first, *rest = [lexeme for lexeme in segment if lexeme[0] or lexeme[1].strip()] or [("", "")]
    name, _, value = first[1].partition("=")
    texts = [value.strip(), *[text if kind else text.strip() for kind, text in rest]]
    return name.strip().lower(), "".join(texts)


def with_sections_joined(parameters: dict[str, str]) -> dict[str, str]:
    """Parameters with those decoded and joined that are encoded or in sections (RFC 2231 sections 3 and 4).

    Such a one counts more than one of the same name that is neither.
    """
    joined = {name: value for name, value in parameters.items() if name and "*" not in name}
    for name in parameters:
        base, asterisk, section = name.partition("*")
        if asterisk and section in ("", "0", "0*"):
            joined[base] = text_of_sections(base, parameters)
    return joined


def text_of_sections(name: str, parameters: dict[str, str]) -> str:
    """The value of a parameter that is encoded, or in sections, or both."""
    names = [f"{name}*"] if f"{name}*" in parameters else []
    names = names or [f"{name}*{number}" for number in range(len(parameters))]
    charset, octets = "", []
    for index, section in enumerate(names):
        if section in parameters and not section.endswith("*"):
            octets.append(octets_of(parameters[section]))
            continue
        value = parameters.get(section if section in parameters else f"{section}*")
        if value is None:
            break
        if not index and value.count("'") >= 2:
            charset, _, value = value.split("'", 2)
        octets.append(percent_decoded(octets_of(value)))
    return charset_text(b"".join(octets), charset)


def octets_of(text: str) -> bytes:
    """The octets that became the text."""
    return text.encode("utf-8", "surrogateescape")


def percent_decoded(octets: bytes) -> bytes:
    """Octets with %XX replaced by the octet that it stands for (RFC 2231 section 4)."""
    first, *pieces = octets.split(b"%")
    for index, piece in enumerate(pieces):
        is_code = len(piece) > 1 and HEXADECIMAL.issuperset(piece[:2])
        pieces[index] = bytes((int(piece[:2], 16),)) + piece[2:] if is_code else b"%" + piece
    return b"".join([first, *pieces])


def mailboxes_of(body: bytes) -> list[tuple[str, str, str]]:
    """The addresses in the body of a field that has addresses: display name, local part, domain of each.

    The display name is decoded, the local part unquoted; "" is what is missing. A group gives its members, a source
    route is dropped, and so is <>. Source: RFC 5322 sections 3.4 and 4.4. What is malformed gives what can be found.
    """
    mailboxes: list[tuple[str, str, str]] = []
    phrase: list[tuple[str, str]] | None = None  # the lexemes before <; None outside of <>
    words: list[tuple[str, str]] = []
    is_complete = False  # what follows > does not belong to the address
    for kind, text in itertools.chain(lexemes(raw_text(body), ADDRESS_SPECIALS), ((",", ""),)):
        if kind == "<":
            phrase, words, is_complete = words, [], False
        elif kind == ":":  # the name of a group, or a source route, ends
            words = []
        elif kind == "," and phrase is not None and words and words[0][0] == "@":
            pass  # in a source route
        elif kind in (",", ";", ">"):
            if words and not is_complete:
                mailboxes.append(mailbox(phrase, words))
            phrase, words, is_complete = None, [], kind == ">"
        else:
            words.append((kind, text))
    return [(name, local, domain) for name, local, domain in mailboxes if local or domain]


def mailbox(phrase: list[tuple[str, str]] | None, words: list[tuple[str, str]]) -> tuple[str, str, str]:
    """The display name, local part and domain of an address.

    phrase: the lexemes before its angle brackets; None if it has none, and then other words before it are its name.
    words: the lexemes of the address.
    """
    kinds = [kind for kind, _ in words]
    if "@" not in kinds:
        return display_name(phrase), spelled(words).replace("\0", " "), ""
    at = len(kinds) - 1 - kinds[::-1].index("@")
    before, _, local = spelled(words[:at]).rpartition("\0")
    domain = spelled(words[at + 1 :]).partition("\0")[0]
    return display_name([("", before.replace("\0", " "))] if phrase is None else phrase), local, domain


def spelled(words: list[tuple[str, str]]) -> str:
    """The lexemes of a local part or domain as text, unquoted, with NUL for white space, and none beside dots."""
    texts = []
    for kind, text in words:
        if kind == "[":
            text = f"[{text}]"
        elif kind != '"':
            text = text.replace(" ", "\0").replace("\t", "\0")
        texts.append(text)
    word = "".join(texts)
    if "\0" in word:
        word = "\0".join(filter(None, word.split("\0")))
        word = word.replace("\0.", ".").replace(".\0", ".")
    return word


def display_name(words: list[tuple[str, str]] | None) -> str:
    """The lexemes of a display name as people read them."""
    name = "".join([text for _, text in words or ()]).strip()
    return with_words_decoded(octets_of(name)).strip() if "=?" in name else name


def date_of(text: str) -> tuple[int, int] | None:
    """A date-time: seconds since the epoch, and minutes by which its zone is before UTC. None if it is malformed.

    The weekday and the seconds may be missing, and so may the zone, which is then UTC. What follows the zone does not
    count. Source: RFC 5322 sections 3.3 and 4.3.
    """
    words = "".join([word for kind, word in lexemes(text, '()"\\') if not kind]).replace(",", " ")
    day, month, year, clock, zone, *_ = [*without_weekday(words.split(":")), *[""] * 5]
    date = days_since_epoch(day, month.lower(), year)
    seconds, offset = seconds_of_day(clock.split(":")), minutes_of_zone(zone.lower())
    if date is None or seconds is None or offset is None:
        return None
    return date * 86400 + seconds - offset * 60, offset


def without_weekday(parts: list[str]) -> list[str]:
    """The words of a date-time, without the weekday. parts: its text, divided at colons, beside which space may be."""
    words = ":".join([part.strip() for part in parts]).split()
    return words[1:] if words and words[0].lower() in WEEKDAYS else words


def number_of(digits: str, least: int, most: int) -> int | None:
    """The number, of so many digits; None if it is malformed."""
    return int(digits) if least <= len(digits) <= most and digits.isascii() and digits.isdecimal() else None


def days_since_epoch(day: str, month: str, year: str) -> int | None:
    """The days from 1970-01-01 to a date, month: its name; None if there is no such date.

    A year of two or three digits is taken as RFC 5322 section 4.3 says.
    """
    days, years = number_of(day, 1, 2), number_of(year, 2, 4)
    if days is None or years is None or month not in MONTHS:
        return None
    if len(year) < 4:
        years += 2000 if years < 50 and len(year) == 2 else 1900
    is_leap = years % 4 == 0 and (years % 100 != 0 or years % 400 == 0)
    index = MONTHS.index(month)
    if years < 1900 or not 1 <= days <= (31, 28 + is_leap, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[index]:
        return None
    # Years begin in March here, so that the leap day is the last.
    years -= index < 2
    return years * 365 + years // 4 - years // 100 + years // 400 + ((index + 10) % 12 * 153 + 2) // 5 + days - 719469


def seconds_of_day(parts: list[str]) -> int | None:
    """The seconds since midnight, of hours, minutes and, if they are there, seconds; None if they are malformed."""
    if not 2 <= len(parts) <= 3:
        return None
    hours, minutes, seconds = number_of(parts[0], 1, 2), number_of(parts[1], 2, 2), number_of([*parts, "00"][2], 2, 2)
    if hours is None or minutes is None or seconds is None:
        return None
    if hours > 23 or minutes > 59 or seconds > 60:
        return None
    return hours * 3600 + minutes * 60 + min(seconds, 59)  # a leap second belongs to its minute


def minutes_of_zone(zone: str) -> int | None:
    """The minutes by which a zone is before UTC; None if it is malformed. Names but those of RFC 5322 mean UTC."""
    if zone[:1] not in ("+", "-"):
        return ZONES.get(zone, 0) if not zone or zone.isalpha() else None
    number = number_of(zone[1:], 4, 4)
    if number is None or number % 100 > 59:
        return None
    minutes = number // 100 * 60 + number % 100
    return -minutes if zone.startswith("-") else minutes


# ======================================================================
# MIME
#
# Owns the parts of a message, their transfer encodings, and the text in them.
# Must not know Sieve.
# ======================================================================

NESTING_LIMIT = 100  # of a part; what would be deeper is not taken apart
PARTS_LIMIT = 1000  # of a message; the last one has all that is left
PART_HEADER_LIMIT = 65536  # octets of a part's header; what is more belongs to its body
HEADERS_LIMIT = 1 << 20  # octets of the headers of all parts; the part that exceeds them has all that is left
BOUNDARY_LIMIT = 200  # octets; RFC 2046 section 5.1.1 has 70
DELIMITER_LIMIT = 1024  # octets of a line with a boundary, and white space after it
LOOKALIKES_LIMIT = 100_000  # lines that look like a delimiter and are none; the part with one more has all that is left
WINDOW = 256 * 1024  # octets of a message in which boundaries are looked for at a time
ENCODED_RATIO = 4  # octets, at most, that are read for each decoded one: quoted-printable has 3, and ends of lines
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
ALPHANUMERIC = LETTERS + DIGITS
MESSAGES = ("message/rfc822", "message/global")  # the media types of messages
MARKUP_NAME_LIMIT = 32  # characters of the name of an element or entity that are examined
RAW_ELEMENTS = frozenset(("script", "style"))  # have no text for readers
BREAKING_ELEMENTS = (  # begin and end a line
    "address article aside blockquote body br center dd details dir div dl dt fieldset figcaption figure footer form"
    " frameset h1 h2 h3 h4 h5 h6 head header hr html legend li main menu nav ol p pre section select summary table"
    " tbody textarea tfoot thead tr ul"
)
SEPARATORS = {  # what an element's tags are in the text
    **dict.fromkeys(BREAKING_ELEMENTS.split(), "\0"),
    **dict.fromkeys(("img", "option", "td", "th"), " "),
}
LATIN_1_ENTITIES = (  # the names of the characters from U+00A0 to U+00FF
    "nbsp iexcl cent pound curren yen brvbar sect uml copy ordf laquo not shy reg macr deg plusmn sup2 sup3 acute micro"
    " para middot cedil sup1 ordm raquo frac14 frac12 frac34 iquest Agrave Aacute Acirc Atilde Auml Aring AElig Ccedil"
    " Egrave Eacute Ecirc Euml Igrave Iacute Icirc Iuml ETH Ntilde Ograve Oacute Ocirc Otilde Ouml times Oslash Ugrave"
    " Uacute Ucirc Uuml Yacute THORN szlig agrave aacute acirc atilde auml aring aelig ccedil egrave eacute ecirc euml"
    " igrave iacute icirc iuml eth ntilde ograve oacute ocirc otilde ouml divide oslash ugrave uacute ucirc uuml yacute"
    " thorn yuml"
)
OTHER_ENTITIES = (  # names and characters: other names that are often used
    "amp & lt < gt > quot \" apos ' euro \u20ac trade \u2122 ndash \u2013 mdash \u2014 lsquo \u2018 rsquo \u2019"
    " sbquo \u201a ldquo \u201c rdquo \u201d bdquo \u201e bull \u2022 hellip \u2026 zwnj \u200c zwj \u200d"
    " larr \u2190 rarr \u2192"
)


def whole(message: Message) -> Part:
    """The message itself as a part; its parts are looked for when they are asked for.

    What reads the message raises OSError as Message.read() does.
    """
    content_type = ContentType.parse(field_body(message.header, b"content-type"))
    structure = Structure(message)
    root = Part(structure, None, message.header, content_type, min(message.body_offset, message.size))
    root.known_end = message.size
    structure.open(root)
    return root


def field_body(header: Header, name: bytes) -> bytes | None:
    """The octets of the body of the first field of that name, in lower case; None if it is missing."""
    for start, end in header.spans(name):
        return header.octets[start:end].partition(b":")[2]
    return None


class Part:
    """An entity: a message, or a part of one (RFC 2045 section 2.4).

    header: the header of the entity. content_type: its media type, or the default one. start: the offset of its body in
    the message. parent: the entity that contains it; None for the message itself. depth: how many contain it.

    The others are for Structure. boundary: of a multipart; b"" if it has no parts. found: the parts found so far.
    known_end, prologue_end, epilogue_start: offsets; None while they are not known, or if there is no such thing.
    """

    __slots__ = (
        *("_structure", "boundary", "content_type", "depth", "epilogue_start", "found", "header", "known_end"),
        *("parent", "prologue_end", "start"),
    )

    def __init__(
        self, structure: Structure, parent: Part | None, header: Header, content_type: ContentType, start: int
    ) -> None:
        self._structure, self.parent, self.header, self.content_type = structure, parent, header, content_type
        self.start = start
        self.depth: int = parent.depth + 1 if parent else 0
        self.boundary = b""
        self.found: list[Part] = []
        self.known_end: int | None = None
        self.prologue_end: int | None = None
        self.epilogue_start: int | None = None

    @property
    def end(self) -> int:
        """The offset of the end of its body in the message. The message is read up to there."""
        while self.known_end is None:
            self._structure.step()
        return self.known_end

    def children(self) -> Iterator[Part]:
        """The parts of a multipart, and the message in a message/rfc822. The message is read as far as needed."""
        index = 0
        while True:
            if index < len(self.found):
                yield self.found[index]
                index += 1
            elif self._structure.may_have_more(self):
                self._structure.step()
            else:
                return

    def walk(self) -> Iterator[Part]:
        """Itself and all the parts in it, each before its own parts."""
        levels: list[Iterator[Part]] = [iter((self,))]
        while levels:
            part = next(levels[-1], None)
            if part is None:
                levels.pop()
            else:
                yield part
                levels.append(part.children())

    def transfer_encoding(self) -> str:
        """The Content-Transfer-Encoding, in lower case (RFC 2045 section 6); "7bit" if it is missing."""
        body = field_body(self.header, b"content-transfer-encoding")
        value = value_and_parameters(body or b"")[0]
        return first_word(value) or "7bit"

    def content(self, limit: int) -> bytes:
        """The octets of its body, without the transfer encoding; at most so many. Those of a multipart are as they are.

        Of octets that say nothing, such as what does not belong to base64, only so many are read as the limit allows.
        """
        decode = None if self.content_type.type == "multipart" else DECODERS.get(self.transfer_encoding())
        if not decode:
            return b"".join(self._pieces(limit))
        decoded, size, rest = [], 0, b""
        for piece in self._pieces(ENCODED_RATIO * limit + READ_SIZE):
            octets, rest = decode(rest + piece, False)
            decoded.append(octets)
            size += len(octets)
            if size >= limit:
                break
        else:
            decoded.append(decode(rest, True)[0])
        return b"".join(decoded)[:limit]

    def text(self, limit: int) -> str:
        """The text that its content is, by its charset, and without the markup if that is HTML.

        limit: octets of the content, at most. Octets that are no text in that charset become surrogates (PEP 383).
        """
        content = self.content(limit)
        return self.text_of(content, len(content) < limit)

    def text_of(self, content: bytes, complete: bool = False) -> str:
        """The text that content() has; see text(). complete: whether nothing of it is left out."""
        charset = self.content_type.parameters.get("charset", "us-ascii")
        text = charset_text(content, charset, complete)
        return html_to_text(text) if str(self.content_type) == "text/html" else text

    def prologue(self, limit: int) -> bytes:
        """What a multipart has before its first part (RFC 2046 section 5.1.1: preamble), at most so many octets.

        All of the body, if there is no part.
        """
        if not self.boundary:
            return b""
        return b"".join(self._pieces(limit, is_prologue=True))

    def epilogue(self, limit: int) -> bytes:
        """What a multipart has after its last part, at most so many octets."""
        while self._structure.may_have_more(self):
            self._structure.step()
        if self.epilogue_start is None:
            return b""
        return self._structure.message.read(self.epilogue_start, max(0, min(limit, self.end - self.epilogue_start)))

    def _pieces(self, limit: int, is_prologue: bool = False) -> Iterator[bytes]:
        """The octets of its body, or of its prologue, at most so many. The message is read little further than that."""
        structure, offset = self._structure, self.start
        stop = offset + limit
        while offset < stop:
            wanted = min(offset + READ_SIZE, stop)
            while (end := self._end_of(is_prologue)) is None and structure.position <= wanted:
                structure.step()
            size = wanted - offset if end is None else min(wanted, end) - offset
            piece = structure.message.read(offset, size) if size > 0 else b""
            if not piece:
                return
            yield piece
            offset += len(piece)

    def _end_of(self, is_prologue: bool) -> int | None:
        """The end of the prologue, or of the body, as far as it is known."""
        if is_prologue and (self.prologue_end is not None or self._structure.may_have_more(self)):
            return self.prologue_end
        return self.known_end


class Structure:
    """Finds the parts of a message, in one pass over it, and no further than anybody asks (RFC 2046 section 5.1).

    message: what is looked through. position: the offset up to which this was done. A delimiter, with the end of the
    line before it, is found no earlier than at that offset, but for a CR just before it.
    """

    def __init__(self, message: Message) -> None:
        self.message = message
        self.position = max(0, message.body_offset - 1)
        self._parts, self._headers_left, self._lookalikes_left = 0, HEADERS_LIMIT, LOOKALIKES_LIMIT
        self._open: list[Part] = []  # those that have not ended, each in the one before it
        self._delimiters: dict[bytes, tuple[Part, bool]] = {}  # the multipart of each, and whether it is the last one
        self._needle = b""  # what all of them begin with
        self._window, self._window_start = b"", 0

    def may_have_more(self, part: Part) -> bool:
        """Whether more of its parts, or its end, may still be found."""
        return part in self._open and bool(part.boundary) and part.epilogue_start is None

    def step(self) -> None:
        """Looks for a delimiter in the next piece of the message: there parts end, and one may begin."""
        delimiter = self._next_delimiter()
        if not delimiter:
            return
        start, end, line = delimiter
        multipart, is_last = self._delimiters[line]
        before = start - (self.message.read(start - 1, 1) == b"\r")
        while self._open[-1] is not multipart:
            self._close(self._open.pop(), before)
        if multipart.prologue_end is None:
            multipart.prologue_end = max(multipart.start, before)
        after = min(end + 1, self.message.size)
        if is_last:
            multipart.epilogue_start = after
            self._prepare()
        else:
            self._begin(multipart, after)

    def open(self, part: Part) -> None:
        """Takes a part that begins; its body begins after the position."""
        self._parts += 1
        self._open.append(part)
        if part.depth < NESTING_LIMIT:
            content_type = part.content_type
            if content_type.type == "multipart":
                boundary = octets_of(content_type.parameters.get("boundary", "").rstrip())
                part.boundary = boundary if len(boundary) <= BOUNDARY_LIMIT else b""
            elif str(content_type) in MESSAGES and part.transfer_encoding() not in DECODERS:
                self._begin(part, part.start)
                return
        self._prepare()

    def _begin(self, parent: Part, offset: int) -> None:
        """Adds the part that begins at that offset with its header."""
        header, start = self._header_at(offset)
        is_rest = self._parts == PARTS_LIMIT - 1 or len(header.octets) > self._headers_left
        if is_rest:
            header, start = NO_HEADER, offset
        self._headers_left -= len(header.octets)
        default = "message/rfc822" if str(parent.content_type) == "multipart/digest" else "text/plain"
        content_type = ContentType.parse(field_body(header, b"content-type"), default)
        part = Part(self, parent, header, content_type, start)
        parent.found.append(part)
        self.position = start - 1
        if is_rest:
            self._open.append(part)
            self._finish()
        else:
            self.open(part)

    def _header_at(self, offset: int) -> tuple[Header, int]:
        """The header that begins at that offset, and the offset of the body: after an empty line, or at a delimiter."""
        for size in (4096, PART_HEADER_LIMIT):
            content = self.message.read(offset, size)
            octets = Header.of(content).octets
            if len(octets) < max(size, len(content)):
                break
        else:
            octets = octets[: octets.rfind(LF) + 1] or octets
        for start, end in self._candidates(octets, 0):
            if octets[start + 3 : end if end >= 0 else None].rstrip() in self._delimiters:
                return Header(octets[: start + 1]), offset + start + 1
        rest = content[len(octets) : len(octets) + 2]
        return Header(octets), offset + len(octets) + (1 if rest.startswith(LF) else 2 * (rest == CRLF))

    def _next_delimiter(self) -> tuple[int, int, bytes] | None:
        """The next delimiter in the window: the offsets of the LFs before and after it, and itself without its dashes.

        If there is none, the window moves on; at the end of the message, the parts end.
        """
        if not self._delimiters:
            self._finish()
            return None
        if not self._window:
            self._window, self._window_start = self.message.read(self.position, WINDOW), self.position
        window, offset = self._window, self._window_start
        at_end = len(window) < WINDOW or offset + len(window) >= self.message.size
        for start, end in self._candidates(window, self.position - offset):
            if end < 0 and start + DELIMITER_LIMIT > len(window):
                if not at_end:
                    self._move_to(offset + start)
                    return None
                end = len(window)
            line = window[start + 3 : max(end, 0)].rstrip()
            if line in self._delimiters:
                self.position = offset + end
                return offset + start, offset + end, line
            self._lookalikes_left -= 1
            if self._lookalikes_left < 0:
                break
        if at_end or self._lookalikes_left < 0:
            self._finish()
        else:
            self._move_to(offset + len(window) - len(self._needle) + 1)
        return None

    def _move_to(self, offset: int) -> None:
        self.position = offset
        self._window = b""

    def _candidates(self, octets: bytes, start: int) -> Iterator[tuple[int, int]]:
        """Where lines begin as a delimiter does: the indexes of the LFs before and after each; -1 for one too far."""
        start = octets.find(self._needle, start) if self._delimiters else -1
        while start >= 0:
            yield start, octets.find(LF, start + 1, start + DELIMITER_LIMIT)
            start = octets.find(self._needle, start + 1)

    def _prepare(self) -> None:
        """Makes the delimiters those of the open multiparts; of two that are the same, the inner one counts."""
        multiparts = [part for part in self._open if part.boundary and part.epilogue_start is None]
        self._delimiters = {}
        for part in multiparts:
            self._delimiters[part.boundary], self._delimiters[part.boundary + b"--"] = (part, False), (part, True)
        self._needle = b"\n--" + (multiparts[0].boundary if len(multiparts) == 1 else b"")

    def _finish(self) -> None:
        """Ends all parts with the message."""
        while self._open:
            self._close(self._open.pop(), self.message.size)
        self._delimiters = {}
        self._move_to(self.message.size)

    def _close(self, part: Part, end: int) -> None:
        if part.known_end is None:
            part.known_end = max(part.start, end)


def decode_base64(octets: bytes, is_end: bool) -> tuple[bytes, bytes]:
    """Octets decoded from base64 (RFC 2045 section 6.8), and those at their end that need what follows.

    What does not belong to base64 is left out; padding may be missing, or anywhere. is_end: whether nothing follows.
    """
    from binascii import a2b_base64

    octets = octets.translate(None, bytes(set(range(256)).difference(BASE64)))
    *padded, last = octets.split(b"=")
    whole_size = len(last) if is_end else len(last) // 4 * 4
    texts = [text[: len(text) - (len(text) % 4 == 1)] for text in (*padded, last[:whole_size]) if text]
    return b"".join([a2b_base64(text + b"==") for text in texts]), last[whole_size:]


def decode_quoted_printable(octets: bytes, is_end: bool) -> tuple[bytes, bytes]:
    """Octets decoded from quoted-printable (RFC 2045 section 6.7), and those at their end that need what follows.

    White space at the end of lines is left out; what is malformed stays. is_end: whether nothing follows.
    """
    from binascii import a2b_qp

    size = len(octets)
    if not is_end:
        size = octets.rfind(LF) + 1 or (octets.rfind(b"=") if b"=" in octets[-2:] else size)
    octets, rest = octets[:size], octets[size:]
    if b" \n" in octets or b"\t\n" in octets or b" \r\n" in octets or b"\t\r\n" in octets:
        *lines, last = octets.split(LF)
        octets = LF.join([*map(bytes.rstrip, lines), last])
    return a2b_qp(octets), rest


def decode_uuencode(octets: bytes, is_end: bool) -> tuple[bytes, bytes]:
    """Octets decoded from the format of uuencode(1), and those at their end that need what follows.

    Lines that are none of data are left out. is_end: whether nothing follows.
    """
    from binascii import Error, a2b_uu

    size = len(octets) if is_end else octets.rfind(LF) + 1 or len(octets)
    decoded = []
    for line in octets[:size].splitlines():
        length = ((line[0] - 32 & 63) + 2) // 3 * 4 + 1 if line else 0
        if 1 < length <= len(line):
            try:
                decoded.append(a2b_uu(line[:length]))
            except Error:
                pass  # no line of data
    return b"".join(decoded), octets[size:]


DECODERS: dict[str, Callable[[bytes, bool], tuple[bytes, bytes]]] = {
    "base64": decode_base64,
    "quoted-printable": decode_quoted_printable,
    **dict.fromkeys(("x-uuencode", "x-uue", "uuencode", "uue"), decode_uuencode),
}


def html_to_text(markup: str) -> str:
    """HTML as text: without tags, comments, scripts, styles and title; with characters in place of their references.

    White space becomes single spaces; elements such as paragraphs begin lines. What is malformed is taken much as
    browsers take it: a comment or a tag that does not end has the rest of the text.
    """
    markup = markup.replace("\0", "\ufffd")
    while "<<" in markup:
        markup = markup.replace("<<", "<")
    texts, end = [], 0
    while (start := markup.find("<", end)) >= 0:
        texts.append(markup[end:start])
        separator, end = end_of_markup(markup, start + 1)
        texts.append(separator)
    texts.append(markup[end:])
    lines = [" ".join(line.split()) for line in with_references_resolved("".join(texts)).split("\0")]
    return "\n".join(filter(None, lines))


def end_of_markup(markup: str, start: int) -> tuple[str, int]:
    """What a tag, comment or the like is in the text, NUL for the end of a line; and the index of what follows it.

    start: the index after its "<".
    """
    if markup.startswith("!--", start):
        return "", index_after("-->", markup, start + 1)
    if markup.startswith(("!", "?"), start):
        return "", index_after(">", markup, start)
    is_end_tag = markup.startswith("/", start)
    name = leading(ALPHANUMERIC, markup, start + is_end_tag).lower()
    if not name or name[0] in DIGITS:
        return ("", index_after(">", markup, start)) if is_end_tag else ("<", start)
    end = end_of_tag(markup, start)
    if name in RAW_ELEMENTS and not is_end_tag:
        end = end_of_raw_element(name, markup, end)
    return SEPARATORS.get(name, ""), end


def index_after(mark: str, text: str, start: int) -> int:
    """The index after the mark, looked for from start on; the length of the text if it is not there."""
    place = text.find(mark, start)
    return place + len(mark) if place >= 0 else len(text)


def leading(characters: str, text: str, start: int) -> str:
    """These characters at an index of the text, MARKUP_NAME_LIMIT of them at most."""
    head = text[start : start + MARKUP_NAME_LIMIT]
    return head[: len(head) - len(head.lstrip(characters))]


def end_of_tag(markup: str, start: int) -> int:
    """The index after the ">" of a tag that is not in the quotes of an attribute's value."""
    end = index_after(">", markup, start)
    while (equals := markup.find("=", start, end)) >= 0:
        value = markup[equals + 1 : equals + 17].lstrip()
        start = equals + 1
        if value.startswith(('"', "'")):
            quote = markup.find(value[0], start)
            start = index_after(value[0], markup, quote + 1)
            if start > end:
                end = index_after(">", markup, start)
    return end


def end_of_raw_element(name: str, markup: str, start: int) -> int:
    """The index after the end tag of an element with text that is no markup. start: the index after its start tag."""
    while (start := markup.find("</", start)) >= 0:
        if leading(ALPHANUMERIC, markup, start + 2).lower() == name:
            return end_of_tag(markup, start)
        start += 2
    return len(markup)


def with_references_resolved(text: str) -> str:
    """Text with characters in place of the references to them: &amp; &#38; &#x26; and those without a semicolon."""
    first, *pieces = text.split("&")
    if not pieces:
        return text
    words = OTHER_ENTITIES.split(" ")
    entities = dict(zip(LATIN_1_ENTITIES.split(), map(chr, range(0xA0, 0x100)))) | dict(zip(words[::2], words[1::2]))
    texts = [first]
    for piece in pieces:
        character, end = referenced_character(piece, entities)
        texts.append(character + piece[end:] if character else f"&{piece}")
    return "".join(texts)


def referenced_character(text: str, entities: dict[str, str]) -> tuple[str, int]:
    """The character for the reference that text begins with, and the index of the reference's end; "" if it is none.

    text: without the "&". entities: characters by the names that are often used. The others take time to load.
    """
    if text.startswith("#"):
        start, base, digits = (2, 16, "0123456789abcdefABCDEF") if text[1:2] in ("x", "X") else (1, 10, DIGITS)
        number = leading(digits, text, start)
        character = character_of(int(number, base)) if number else ""
        end = start + len(number)
    else:
        name = leading(ALPHANUMERIC, text, 0)
        character, end = entities.get(name, ""), len(name)
        if not character and name and text.startswith(";", end):
            from html.entities import html5

            character = html5.get(f"{name};", "")
    return character, end + text.startswith(";", end)


def character_of(number: int) -> str:
    """The character for a number in a reference; those of C1 are meant as windows-1252."""
    if 0x80 <= number < 0xA0:
        return bytes((number,)).decode("cp1252", "replace")
    if not number or 0xD800 <= number < 0xE000 or number > sys.maxunicode:
        return "\ufffd"
    return chr(number)


# ======================================================================
# Maildir++
#
# Owns the names of folders and message files, the files of quota, keywords and
# subscriptions, and Dovecot's locks.
# Must not know whose Maildir it is.
# ======================================================================

INBOX = ""
QUOTA_FILE, KEYWORD_FILE, LOCK_FILE = "maildirsize", "dovecot-keywords", "dovecot-uidlist.lock"
SUBSCRIPTIONS, SUBSCRIPTIONS_LOCK = "subscriptions", "subscriptions.lock"
COURIER_SUBSCRIPTIONS = "courierimapsubscribed"
SUBSCRIPTIONS_LIMIT = 1 << 20  # octets; a user may put a larger file there
SUBSCRIPTIONS_PATIENCE = 2  # seconds to wait for its lock while mail waits
QUOTA_FILE_LIMIT = 5120  # octets; a larger file is replaced by a new count
QUOTA_STALE = 15 * 60  # seconds; if the file is older, a recount comes before a refusal
RECOUNTS = 3  # counts of a Maildir that changes meanwhile
APPENDS = 3  # appends to a file that is replaced meanwhile
FLAG_LETTERS = {r"\draft": "D", r"\flagged": "F", r"\answered": "R", r"\seen": "S", r"\deleted": "T"}
KEYWORD_ATOM = frozenset(map(chr, range(33, 127))) - frozenset('(){%*"\\]')  # RFC 3501 section 9, flag-keyword
KEYWORD_LETTERS = "abcdefghijklmnopqrstuvwxyz"
LOCK_PATIENCE, LOCK_STALE = 30, 120  # seconds to wait for a lock; the age at which a lock is stale


def folder_parts(name: str, config: Config) -> tuple[str, ...]:
    """The levels of a folder's name as people write it; () for the INBOX. A slash too many is none.

    Raises ValueError for a name that no folder can have.
    """
    if name.upper() == "INBOX":
        return ()
    name = composed(name)
    parts = tuple(filter(None, name.split("/"))) if config.unixhierarchysep else tuple(name.split("."))
    if not parts or not all(part and is_printable(part) and "/" not in part and "." not in part for part in parts):
        raise ValueError(f"{name!r} cannot be a folder's name")
    if len(folder_directory(parts)) > NAME_LIMIT:
        raise ValueError(f"{name!r} is too long for a folder's name")
    return parts


def folder_directory(parts: Sequence[str]) -> str:
    """The directory of the folder with these parts, see folder_parts(); "" for the INBOX."""
    return "".join(f".{to_modified_utf7(part)}" for part in parts)


def folder_spellings(name: str, config: Config) -> list[str]:
    """The directories that a folder may have: in modified UTF-7, and after it in UTF-8 as Courier writes it.

    Each also with decomposed characters, as some clients write them. Raises ValueError for a name that no folder can
    have.
    """
    parts = folder_parts(name, config)
    folder = folder_directory(parts)
    if "&" not in folder:
        return [folder]
    import unicodedata

    in_utf7 = [folder, folder_directory([unicodedata.normalize("NFD", part) for part in parts])]
    return list(dict.fromkeys([*in_utf7, *map(from_modified_utf7, in_utf7)]))


def similar_name(folder: str) -> tuple[str, ...]:
    """The levels of a folder's name, without the differences of case and of hyphen, underscore and space."""
    parts = [from_modified_utf7(part) for part in folder.split(".")[1:]]
    return tuple(part.casefold().replace("-", " ").replace("_", " ") for part in parts)


def to_modified_utf7(text: str) -> str:
    """Text in the ASCII that IMAP uses for folder names. Source: RFC 3501 section 5.1.3."""
    encoded, foreign = [], ""
    for character in f"{text}\0":
        if character == "\0" or " " <= character <= "~":
            if foreign:
                encoded.append(f"&{modified_base64(foreign)}-")
                foreign = ""
            encoded.append("&-" if character == "&" else character)
        else:
            foreign += character
    return "".join(encoded)[:-1]


def modified_base64(text: str) -> str:
    """The UTF-16 of a text in the base64 of RFC 3501 section 5.1.3."""
    from binascii import b2a_base64

    octets = text.encode("utf-16-be", "surrogatepass")
    return b2a_base64(octets, newline=False).decode("ascii").rstrip("=").replace("/", ",")


def from_modified_utf7(text: str) -> str:
    """The text that to_modified_utf7() has encoded; malformed parts stay as they are."""
    from binascii import a2b_base64

    first, *rest = text.split("&")
    decoded = [first]
    for part in rest:
        encoded, _, after = part.partition("-")
        padding = "=" * (-len(encoded) % 4)
        try:
            octets = a2b_base64(encoded.replace(",", "/") + padding)
            decoded.append((octets.decode("utf-16-be") if encoded else "&") + after)
        except ValueError:
            decoded.append(f"&{part}")
    return "".join(decoded)


class QuotaUsage:
    """How much of a quota is used. limits, used: octets and messages; a limit of 0 is no limit.

    doubtful: whether a count of the messages must confirm that the quota is full. Source: Maildir++ quota.
    """

    def __init__(self, limits: tuple[int, int], used: tuple[int, int], doubtful: bool) -> None:
        self.limits, self.used, self.doubtful = limits, used, doubtful

    @classmethod
    def parse(cls, content: bytes, age: float) -> QuotaUsage:
        """The usage in a file maildirsize. age: seconds since it was written. Raises ValueError."""
        definition, *changes, rest = content.decode("ascii").split("\n")
        if rest or not changes or len(content) >= QUOTA_FILE_LIMIT:
            raise ValueError("is cut short, or too long")
        octets = messages = 0
        for change in changes:
            more_octets, more_messages = change.split()
            octets, messages = octets + int(more_octets), messages + int(more_messages)
        if octets < 0 or messages < 0:
            raise ValueError("is negative")
        return cls(parse_limits(definition), (octets, messages), len(changes) > 1 or age > QUOTA_STALE)

    def render(self) -> bytes:
        """The content of a file maildirsize with this usage."""
        octets, messages = self.used
        return f"{render_limits(self.limits)}\n{octets} {messages}\n".encode()

    def has_room_for(self, octets: int, messages: int) -> bool:
        """Whether so much more is within the limits."""
        more = octets, messages
        return all(not limit or used + new <= limit for limit, used, new in zip(self.limits, self.used, more))


def parse_limits(definition: str) -> tuple[int, int]:
    """The octets and messages of a quota definition such as "1000000S,1000C". Raises ValueError."""
    limits = {"S": 0, "C": 0}
    for limit in definition.strip().split(","):
        if limit[-1:] not in limits:
            raise ValueError("is not a quota definition")
        limits[limit[-1]] = as_number(limit[:-1])
    return limits["S"], limits["C"]


def render_limits(limits: tuple[int, int]) -> str:
    """The quota definition that parse_limits() reads."""
    octets, messages = limits
    parts = [f"{octets}S"] if octets or not messages else []
    parts += [f"{messages}C"] if messages else []
    return ",".join(parts)


def in_words(amount: tuple[int, int]) -> str:
    """Octets and messages for the log, such as "1000 octets, 10 messages"; without zeros."""
    return ", ".join(f"{number} {unit}" for number, unit in zip(amount, ("octets", "messages")) if number)


class QuotaFile:
    """The quota of a Maildir, kept in its file maildirsize. Methods raise OSError.

    limits: the octets and messages that the Maildir may have; None if the file itself gives them.
    Source: Maildir++ quota.
    """

    def __init__(self, directory: Directory, limits: tuple[int, int] | None, config: Config) -> None:
        self._directory, self._limits, self._config = directory, limits, config
        self._default = config.default_quota, config.default_quota_messages
        names = config.quota_exclude_folders
        self._excluded = {spelling for name in names for spelling in folder_spellings(name, config)}
        self._excludes_deleted = config.quota_exclude_deleted
        self._no_quota = False

    def create(self) -> None:
        """Makes the file of a new, empty Maildir, if it has a quota."""
        config = self._config
        wanted = max(config.autocreate_quota, 0), max(config.autocreate_quota_messages, 0)
        limits = self._limits or (wanted if any(wanted) else self._default)
        if any(limits):
            self._directory.add_file(INBOX, QUOTA_FILE, QuotaUsage(limits, (0, 0), doubtful=False).render())

    def usage(self) -> QuotaUsage | None:
        """The usage in the file, or a new count if the file is unreliable.

        None if there is no quota, or another process counts.
        """
        try:
            fd = self._directory.open_file(INBOX, QUOTA_FILE, os.O_RDONLY)
        except FileNotFoundError:
            limits = self._limits or self._default
            self._no_quota = not any(limits)
            return None if self._no_quota else self.recount(limits)
        try:
            age = time.time() - os.fstat(fd).st_mtime
            content = os.read(fd, QUOTA_FILE_LIMIT)
        finally:
            os.close(fd)
        try:
            usage = QuotaUsage.parse(content, age)
        except ValueError:
            return self.recount(self._limits or self._limits_in(content))
        if self._limits and usage.limits != self._limits:
            return self.recount(self._limits)
        return usage

    def add(self, octets: int, messages: int) -> None:
        """Adds to the usage, if there is a quota. If that fails, the next reader of the file counts anew."""
        if self._no_quota:
            return
        line = f"{octets} {messages}\n".encode()
        try:
            for _ in range(APPENDS):
                if self._directory.append_to_file(INBOX, QUOTA_FILE, line):
                    return
            self._invalidate()
        except FileNotFoundError:
            return  # there is no quota
        except OSError:
            self._invalidate()
            raise

    def recount(self, limits: tuple[int, int]) -> QuotaUsage | None:
        """Counts all messages and replaces the file, again if the Maildir has changed meanwhile.

        None while another process counts them.
        """
        usage = None
        for _ in range(RECOUNTS):
            fd = self._lock(limits)
            if fd < 0:
                break
            try:
                before = self._counted_directories()
                usage = self._count_into_file(fd, limits, before)
                if self._counted_directories() == before:
                    break
            finally:
                os.close(fd)
        return usage

    def includes(self, folder: str, name: str) -> bool:
        """Whether a message in that folder counts. name: the end of its file's name, which has its flags."""
        return folder not in self._excluded and not (self._excludes_deleted and is_deleted(name))

    def _invalidate(self) -> None:
        """Makes the usage in the file unreadable but keeps the limits, which may stand nowhere else.

        One octet is overwritten in place: that takes no space on a full disk.
        """
        fd = self._directory.open_file(INBOX, QUOTA_FILE, os.O_RDWR)
        try:
            usage = os.read(fd, QUOTA_FILE_LIMIT).find(LF) + 1  # after the line with the limits
            if usage:
                os.pwrite(fd, b"?", usage)
        finally:
            os.close(fd)

    def _limits_in(self, content: bytes) -> tuple[int, int]:
        """The limits in a file whose usage cannot be relied on."""
        try:
            return parse_limits(content.partition(LF)[0].decode("ascii"))
        except ValueError as error:
            log.warning("quota lost", mailbox=self._directory.path, cause=error)
            return self._default

    def _lock(self, limits: tuple[int, int]) -> int:
        """A descriptor of the file, locked; -1 if another process counts. A missing file is made first."""
        import fcntl

        try:
            fd = self._open_to_lock()
        except FileNotFoundError:
            self._directory.add_file(INBOX, QUOTA_FILE, f"{render_limits(limits)}\n?\n".encode())
            fd = self._open_to_lock()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(fd).st_nlink > 0  # else another process has just counted, and replaced the file
        except BlockingIOError:
            is_ours = False
        except OSError:
            return fd  # a file system without locks
        if not is_ours:
            os.close(fd)
        return fd if is_ours else -1

    def _open_to_lock(self) -> int:
        try:
            return self._directory.open_file(INBOX, QUOTA_FILE, os.O_RDWR)  # LOCK_EX on NFS needs write access
        except PermissionError:
            return self._directory.open_file(INBOX, QUOTA_FILE, os.O_RDONLY)

    def _count_into_file(self, old: int, limits: tuple[int, int], directories: Iterable[str]) -> QuotaUsage:
        """Counts the messages in these directories and replaces the file. old: a descriptor of the present file.

        Additions of other processes to the old file, made during the count, are copied to the new one. Some may be in
        the count already. That does no harm: a usage that is too high is counted again before mail is refused for it,
        while one that is too low would stay. So subtractions are not copied.
        """
        start = os.fstat(old).st_size
        octets = messages = 0
        for directory in directories:
            for size in self._sizes_in(directory):
                octets, messages = octets + size, messages + 1
        usage = QuotaUsage(limits, (octets, messages), doubtful=False)
        self._directory.replace_file(INBOX, QUOTA_FILE, usage.render())
        lines = os.pread(old, READ_SIZE, start).splitlines(keepends=True)
        if additions := b"".join(line for line in lines if b"-" not in line):
            try:
                self._directory.append_to_file(INBOX, QUOTA_FILE, additions)
            except OSError:
                self._invalidate()
                raise
        return usage

    def _counted_directories(self) -> dict[str, int]:
        """Each new/ and cur/ whose messages count, with the time of its last change in nanoseconds."""
        folders = [name for name in self._directory.subdirectories() if name.startswith(".")]
        changed = {}
        counted = [folder for folder in (INBOX, *folders) if self.includes(folder, "")]
        for directory in (f"{folder}/{kind}" for folder in counted for kind in ("new", "cur")):
            try:
                fd = self._directory.open(directory)
            except (FileNotFoundError, NotADirectoryError):
                continue  # no folder of messages
            changed[directory] = os.fstat(fd).st_mtime_ns
            os.close(fd)
        return changed

    def _sizes_in(self, directory: str) -> Iterator[int]:
        """The octets of each message in the directory that counts in the quota."""
        fd = self._directory.open(directory)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or (self._excludes_deleted and is_deleted(entry.name)):
                        continue
                    try:
                        yield size_of(entry)
                    except FileNotFoundError:
                        continue  # it has been removed or renamed meanwhile
        finally:
            os.close(fd)


def is_deleted(name: str) -> bool:
    """Whether a message file's name, or the end of it, has the flag of deleted messages."""
    return FLAG_LETTERS[r"\deleted"] in name.partition(":2,")[2]


def size_of(message: os.DirEntry[str]) -> int:
    """The octets of a message file: from ",S=" in its name, else from stat(2). Raises OSError."""
    after = message.name.partition(",S=")[2]
    digits = after[: len(after) - len(after.lstrip(DIGITS))]
    if digits and after[len(digits) :][:1] in ("", ",", ":"):
        return int(digits)
    return message.stat(follow_symlinks=False).st_size


class KeywordFile:
    """The file dovecot-keywords of a folder, by which Dovecot gives each keyword a letter.

    Methods raise OSError. Source: Dovecot's documentation of its Maildir format.
    """

    def __init__(self, directory: Directory, folder: str) -> None:
        self._directory, self._folder = directory, folder

    def letters(self, keywords: Sequence[str]) -> set[str]:
        """The letters of these keywords. A new keyword gets a free letter, or is left out if none is free."""
        known = self._read()[0]
        if not all(keyword.lower() in known for keyword in keywords):
            with DovecotLock(self._directory, self._folder, LOCK_FILE, LOCK_PATIENCE):
                known = self._add(keywords)
        return {KEYWORD_LETTERS[known[keyword.lower()][0]] for keyword in keywords if keyword.lower() in known}

    def _add(self, keywords: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Adds new keywords to the file while letters are free; the keywords as _read() gives them. Needs the lock."""
        known, changed = self._read()
        unused = sorted(set(range(len(KEYWORD_LETTERS))) - {number for number, _ in known.values()})
        for keyword in keywords:
            if keyword.lower() in known:
                continue
            if not unused:
                folder = self._directory.path_of(self._folder)
                log.warning("no letter for keyword", keyword=keyword, mailbox=folder)
                continue
            known[keyword.lower()] = unused.pop(0), keyword
        lines = [f"{number} {name}\n" for number, name in sorted(known.values())]
        # Dovecot sees a change of the file by its time in whole seconds.
        self._directory.replace_file(self._folder, KEYWORD_FILE, "".join(lines).encode(), newer_than=changed)
        return known

    def _read(self) -> tuple[dict[str, tuple[int, str]], float]:
        """The number and name of each keyword, by its name in lower case; and the time of the file."""
        try:
            fd = self._directory.open_file(self._folder, KEYWORD_FILE, os.O_RDONLY)
        except FileNotFoundError:
            return {}, 0
        try:
            content = os.read(fd, READ_SIZE).decode("utf-8", "replace")
            changed = os.fstat(fd).st_mtime
        finally:
            os.close(fd)
        lines = [line.partition(" ") for line in content.split("\n")]
        numbered = [(int(number), name) for number, _, name in lines if number and name and DECIMAL.issuperset(number)]
        return {name.lower(): (number, name) for number, name in numbered if number < len(KEYWORD_LETTERS)}, changed


class SubscriptionFiles:
    """The files in which Dovecot and Courier keep the folders that a user is subscribed to. Methods raise OSError.

    A folder is the name of its directory. Source: Dovecot's and Courier's documentation of their Maildirs.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def create(self, folders: Sequence[str]) -> None:
        """Makes the files of a new Maildir."""
        for_dovecot = ["V\t2", "", *map(subscription_in_dovecot, folders)]
        for file, lines in (
            (SUBSCRIPTIONS, for_dovecot),
            (COURIER_SUBSCRIPTIONS, [f"INBOX{folder}" for folder in folders]),
        ):
            self._directory.add_file(INBOX, file, "".join(f"{line}\n" for line in lines).encode())

    def add(self, folder: str) -> None:
        """Adds a folder to both files."""
        with DovecotLock(self._directory, INBOX, SUBSCRIPTIONS_LOCK, SUBSCRIPTIONS_PATIENCE):
            content = self._read(SUBSCRIPTIONS) or b"V\t2\n\n"
            is_old = not content.startswith(b"V\t2\n")
            self._append(SUBSCRIPTIONS, content, folder[1:] if is_old else subscription_in_dovecot(folder))
            self._append(COURIER_SUBSCRIPTIONS, self._read(COURIER_SUBSCRIPTIONS), f"INBOX{folder}")

    def _append(self, file: str, content: bytes, line: str) -> None:
        if line.encode() in content.split(LF):
            return
        end = b"" if content.endswith(LF) or not content else LF
        self._directory.replace_file(INBOX, file, content + end + line.encode() + LF)

    def _read(self, file: str) -> bytes:
        """The content of a file; b"" if it is missing."""
        try:
            fd = self._directory.open_file(INBOX, file, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        with open(fd, "rb") as stream:
            content = stream.read(SUBSCRIPTIONS_LIMIT + 1)
        if len(content) > SUBSCRIPTIONS_LIMIT:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), f"{self._directory.path}/{file}")
        return content


def subscription_in_dovecot(folder: str) -> str:
    """A folder in the file of Dovecot: its levels with tabs between them."""
    return folder[1:].replace(".", "\t") or "INBOX"


class DovecotLock:
    """A lock file of Dovecot's, by which its processes keep each other from changing files; held in a "with" block.

    patience: seconds to wait for it. Raises OSError, TimeoutError among them.
    """

    def __init__(self, directory: Directory, folder: str, name: str, patience: float) -> None:
        self._directory, self._folder, self._name, self._patience = directory, folder, name, patience
        self._place = -1

    def __enter__(self) -> None:
        self._place = self._directory.open(self._folder)
        try:
            with PathInErrors(f"{self._directory.path_of(self._folder)}/{self._name}"):
                self._take()
        except OSError:
            os.close(self._place)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._holder(self._name)[0] == str(os.getpid()):  # a stale lock may have another holder by now
                os.unlink(self._name, dir_fd=self._place)
        finally:
            os.close(self._place)

    def _take(self) -> None:
        """Makes the lock file. Raises TimeoutError if another process holds the lock for too long."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                fd = os.open(self._name, NEW_FILE, 0o666, dir_fd=self._place)
            except FileExistsError:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "locked for too long") from None
                self._break_if_stale()
                time.sleep(0.02)
            else:
                try:
                    write_all(fd, f"{os.getpid()}:{socket.gethostname()}".encode())
                except OSError:
                    os.unlink(self._name, dir_fd=self._place)
                    raise
                finally:
                    os.close(fd)
                return

    def _holder(self, name: str) -> tuple[str, str, float]:
        """The process and the host that hold the lock, "" if nobody does, and the age of the lock in seconds."""
        try:
            fd = os.open(name, os.O_RDONLY | EXISTING_FILE, dir_fd=self._place)
        except FileNotFoundError:
            return "", "", 0
        try:
            age = time.time() - os.fstat(fd).st_mtime
            process, _, host = os.read(fd, LINE_LIMIT).decode("utf-8", "replace").partition(":")
        finally:
            os.close(fd)
        return process, host, age

    def _is_stale(self, name: str) -> bool:
        """Whether the process that holds the lock has ended, or has held it for too long."""
        process, host, age = self._holder(name)
        return age > LOCK_STALE or (host == socket.gethostname() and process.isdigit() and has_ended(int(process)))

    def _break_if_stale(self) -> None:
        """Removes a stale lock. It is moved aside first: another process may have replaced it meanwhile."""
        if not self._is_stale(self._name):
            return
        aside = f"{self._name}.{unique_name()}"
        try:
            os.rename(self._name, aside, src_dir_fd=self._place, dst_dir_fd=self._place)
        except FileNotFoundError:
            return
        try:
            if self._is_stale(aside):
                process = self._holder(aside)[0]
                log.warning("stale lock removed", mailbox=self._directory.path_of(self._folder), process=process)
            else:
                os.link(aside, self._name, src_dir_fd=self._place, dst_dir_fd=self._place, follow_symlinks=False)
        except FileExistsError:
            return  # a third process has taken the lock
        finally:
            os.unlink(aside, dir_fd=self._place)


def has_ended(process: int) -> bool:
    """Whether there is no process with that id. Uses kill(2), because /proc may hide those of other users."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


# ======================================================================
# Mailboxes
#
# Owns a user's Maildir: its folders, its quota, and how a message gets into it.
# Must not know LMTP or Sieve.
# ======================================================================

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # errors that mean that a folder does not exist


class StoreError(Exception):
    """The store does not take a recipient's mail. It has logged the cause, unless the class has it."""


class UserUnknown(StoreError):
    """The recipient has no mailbox."""


class MailboxFull(StoreError):
    """The mailbox is over its quota, or would be. mailbox, used, limit: its name, and how much it has and may have."""

    def __init__(self, mailbox: str, used: str, limit: str) -> None:
        super().__init__()
        self.mailbox, self.used, self.limit = mailbox, used, limit


class StoreUnavailable(StoreError):
    """The mailbox cannot be used. permanent: whether a later try is of no use."""

    def __init__(self, permanent: bool = False) -> None:
        super().__init__()
        self.permanent = permanent


class Placed:
    """A message in a folder, where readers can see it. It is durable after sync().

    path, name: its file's. octets, messages: its share of the quota's usage.
    """

    def __init__(self, mailbox: Maildir, directory: int, path: str, octets: int, messages: int) -> None:
        self.path, self.name = path, os.path.basename(path)
        self._octets, self._messages = octets, messages
        self._mailbox, self._directory = mailbox, directory

    def sync(self) -> None:
        """Makes it durable, or else takes it back and raises OSError. Called once."""
        try:
            with PathInErrors(os.path.dirname(self.path)):
                sync_directory(self._directory)
        except OSError:
            self.take_back()
            raise

    def take_back(self) -> None:
        """Removes it again. If it cannot, readers go on seeing it, and the log says so."""
        try:
            with self._mailbox.identity, PathInErrors(self.path):
                os.unlink(self.name, dir_fd=self._directory)
        except OSError as error:
            log.error("copy left behind", mailbox=self._mailbox.path, file=self.name, cause=error)
            return
        self._mailbox.charge(-self._octets, -self._messages)

    def close(self) -> None:
        """Closes its descriptor."""
        close_synced(self._directory)


class Folders:
    """The folders of a Maildir, each given as the name of its directory. Methods raise OSError.

    make() and subscribe() are called with the identity of the owner.
    """

    def __init__(self, directory: Directory, identity: Identity, config: Config) -> None:
        self._directory, self._identity, self._config = directory, identity, config
        self._subscriptions, self._may_subscribe = SubscriptionFiles(directory), config.lmtp_autosubscribe
        self._by_similar_name: dict[tuple[str, ...], list[str]] | None = None

    def exists(self, folder: str) -> bool:
        """Whether the folder exists."""
        with self._identity:
            try:
                os.close(self._directory.open(f"{folder}/cur"))
            except OSError as error:
                if error.errno in (*ABSENT, errno.ELOOP):  # ELOOP: a link that is not followed
                    return False
                raise
        return True

    def is_taken(self, folder: str) -> bool:
        """Whether the folder's name belongs to something else: a file, or a symbolic link that is not followed."""
        path = self._directory.path_of(folder)
        with self._identity:
            return os.path.lexists(path) and (
                not os.path.isdir(path) or (self._directory.guarded and os.path.islink(path))
            )

    def resolve(self, name: str, similar: bool) -> str | None:
        """The existing folder of a name as people write it; None if there is none. similar: see Maildir.resolve()."""
        try:
            parts = folder_parts(name, self._config)
            spellings = folder_spellings(name, self._config)
        except ValueError:
            return None
        for folder in spellings:
            if folder == INBOX or self.exists(folder):
                return folder
        return self._most_similar(similar_name(folder_directory(parts))) if similar else None

    def forget(self) -> None:
        """Frees the list of all folders."""
        self._by_similar_name = None

    def make(self, folder: str) -> None:
        """Makes the folder, durably."""
        self._directory.make(folder)
        self._directory.add_file(folder, "maildirfolder", b"")
        for name in ("tmp", "new", "cur"):  # cur/ last: exists() looks for it
            self._directory.make(f"{folder}/{name}")
        if self._by_similar_name is not None:
            self._by_similar_name.setdefault(similar_name(folder), []).append(folder)
        if self._may_subscribe:
            try:
                self._subscriptions.add(folder)
            except OSError as error:
                log.warning("not subscribed", mailbox=self._directory.path_of(folder), cause=error)
                self._may_subscribe = False  # mail need not wait for the same again

    def subscribe(self, names: Sequence[str]) -> None:
        """Subscribes the user of a new Maildir to folders, given their names as people write them."""
        if names:
            self._subscriptions.create([folder_directory(folder_parts(name, self._config)) for name in names])

    def _most_similar(self, wanted: tuple[str, ...]) -> str | None:
        """The existing folder with this similar_name(), else with that of the nearest parent; else None."""
        if self._by_similar_name is None:
            self._by_similar_name = self._list()
        while wanted:
            for folder in self._by_similar_name.get(wanted, ()):
                if self.exists(folder):
                    return folder
            wanted = wanted[:-1]
        return None

    def _list(self) -> dict[tuple[str, ...], list[str]]:
        """All folders, and directories that look like one, by their similar_name(), in order."""
        found: dict[tuple[str, ...], list[str]] = {}
        with self._identity:
            names = self._directory.subdirectories()
        for folder in sorted(name for name in names if name.startswith(".")):
            found.setdefault(similar_name(folder), []).append(folder)
        return found


class Maildir:
    """A user's Maildir, with its folders (Maildir++).

    identity: the owner of its files. owner: the owner's user id and group id. missing: whether it has yet to be made.
    limits: the octets and messages that it may have; None if its file maildirsize gives them. A folder is the name of
    its directory, as resolve() and new_folder() give it; INBOX is the Maildir itself.
    """

    def __init__(
        self,
        path: str,
        identity: Identity,
        config: Config,
        missing: bool = False,
        limits: tuple[int, int] | None = None,
    ) -> None:
        self.path, self.identity = path, identity
        self.owner = identity.uid, identity.gid
        self._config, self._missing = config, missing
        self._directory = Directory(path, identity)
        self._quota = QuotaFile(self._directory, limits, config)
        self._folders = Folders(self._directory, identity, config)

    def key(self, folder: str) -> str:
        """The folder's name in records and in the log, the same for every process."""
        return self._directory.path_of(folder)

    def make(self) -> None:
        """Makes the Maildir if it is missing, as the options autocreate_* say. Raises OSError."""
        if not self._missing:
            return
        with self.identity:
            make_directories(self.path, self._directory.guarded)
            for name in ("tmp", "cur"):
                self._directory.make(name)
            self._folders.subscribe(self._config.autocreate_subscribe_folders)
            for name in self._config.autocreate_inbox_folders:
                if (folder := self.new_folder(name)) != INBOX:
                    self._folders.make(folder)
            self._quota.create()
            self._directory.make("new")  # new/ last: MaildirStore looks for it
        self._missing = False

    def exists(self) -> bool:
        """Whether its directory exists. It does not if, for example, the disk is not mounted."""
        with self.identity:
            return os.path.isdir(self.path)

    def resolve(self, name: str, similar: bool = False) -> str | None:
        """The existing folder of a name as people write it; None if there is none. Raises OSError.

        similar: if no folder has that name, take one with the same similar_name(), or the nearest parent.
        """
        return self._folders.resolve(name, similar and not self._missing)

    def forget_folders(self) -> None:
        """Frees the list of folders that resolve() has made."""
        self._folders.forget()

    def is_one_of(self, folder: str, names: Sequence[str]) -> bool:
        """Whether the folder has one of these names, as people write them."""
        for name in names:
            try:
                if folder in folder_spellings(name, self._config):
                    return True
            except ValueError:
                continue  # no folder has such a name
        return False

    def new_folder(self, name: str) -> str:
        """The folder of a name as people write it; place() makes a missing folder. Raises ValueError."""
        folder = folder_directory(folder_parts(name, self._config))
        if folder and not self._missing and self._folders.is_taken(folder):
            raise ValueError(f"{name!r} is not a folder's name: {self.key(folder)} is something else")
        return folder

    def spool(self) -> Draft:
        """A draft for a message that is still arriving; the Maildir is made if it is missing. Raises OSError."""
        self.make()
        with self.identity:
            return self._directory.new_draft("tmp")

    def check_quota(self, folder: str, octets: int, messages: int) -> None:
        """Raises MailboxFull if so many octets and messages more in the folder would exceed the quota.

        A quota that cannot be read is ignored.
        """
        if self._missing or not self._quota.includes(folder, ""):
            return
        try:
            with self.identity:
                usage = self._quota.usage()
                if usage and usage.doubtful and not usage.has_room_for(octets, messages):
                    usage = self._quota.recount(usage.limits)
        except OSError as error:
            log.warning("quota unknown", mailbox=self.path, cause=error)
            return
        if usage and not usage.has_room_for(octets, messages):
            raise MailboxFull(self.path, in_words(usage.used), in_words(usage.limits))

    def charge(self, octets: int, messages: int) -> None:
        """Adds to the usage of the quota, if there is one."""
        if not messages:
            return
        try:
            with self.identity:
                self._quota.add(octets, messages)
        except OSError as error:
            log.warning("quota unknown", mailbox=self.path, cause=error)

    def place(self, message: Message, folder: str = INBOX, flags: Sequence[str] = (), may_move: bool = True) -> Placed:
        """Puts the message into the folder, with these flags and keywords. The caller syncs and closes the result.

        A missing folder is made. The first placement sets message.draft, which later ones link. may_move: whether this
        is the last placement, so that the draft may be moved. Where neither is possible, or singleinstancestore is off,
        the octets are copied. Raises OSError, and ValueError for a flag that does not exist; nothing is left then where
        readers can see it.
        """
        self.make()
        with self.identity:
            if not message.draft:
                message.draft = self._finished_draft(message)
            place, info = self._target(folder, flags)
            directory = self._directory.open_or_make(place)
            name = f"{unique_name()},S={message.size},W={message.size + message.lines}{info}"
            path = f"{self._directory.path_of(place)}/{name}"
            try:
                with PathInErrors(path):
                    if not self._move_or_link(message.draft, directory, name, may_move):
                        self._copy(message, directory, name)
            except OSError:
                os.close(directory)
                raise
            size, number = (message.size, 1) if self._quota.includes(folder, info) else (0, 0)
            self.charge(size, number)
        return Placed(self, directory, path, size, number)

    def _target(self, folder: str, flags: Sequence[str]) -> tuple[str, str]:
        """The directory for a message with these flags, and the end of its name. Raises OSError and ValueError."""
        if folder != INBOX and not self._folders.exists(folder):
            self._folders.make(folder)
        if not flags:
            return f"{folder}/new", ""
        keywords = [flag for flag in flags if not flag.startswith("\\")]
        if not all(keyword and KEYWORD_ATOM.issuperset(keyword) for keyword in keywords):
            raise ValueError(f"{flags!r} has an invalid keyword")
        try:
            letters = {FLAG_LETTERS[flag.lower()] for flag in flags if flag not in keywords}
        except KeyError as error:
            raise ValueError(f"there is no flag {error}") from None
        if keywords:
            letters |= KeywordFile(self._directory, folder).letters(keywords)
        return f"{folder}/cur", f":2,{''.join(sorted(letters))}"

    def _move_or_link(self, draft: Draft, directory: int, name: str, may_move: bool) -> bool:
        """Moves or links the draft. False, and nothing done, if that is not possible, and a copy may be."""
        if not draft.is_linkable_for(self.identity) or not (may_move or self._config.singleinstancestore):
            return False
        try:
            if may_move:
                draft.move(directory, name)
            else:
                draft.link(directory, name)
        except OSError:
            return False
        return True

    def _copy(self, message: Message, directory: int, name: str) -> None:
        draft = self._finished_draft(message)
        try:
            draft.move(directory, name)
        finally:
            draft.discard()

    def _finished_draft(self, message: Message) -> Draft:
        """A draft in this Maildir with all octets of the message, on the disk."""
        draft = self.spool()
        try:
            if message.content:
                draft.write(message.content)
            else:
                draft.copy_from(message.read, message.size)
            draft.sync()
        except OSError:
            draft.discard()
            raise
        return draft


# ======================================================================
# Users
#
# Owns the user databases: Maildirs, the accounts of this host, Dovecot's.
# Must not know LMTP.
# ======================================================================

NOBODY = 65534  # the user id of the account nobody
ID_LIMIT = 2**32 - 1  # one more than the greatest id of a user or group, credentials(7)
DOVECOT_24 = 3  # the minor version of the protocol that Dovecot 2.4 speaks, and 2.3 does not
# Fields of Dovecot's user database whose names begin like a setting of mailboxes or quotas. A field that is in none of
# these may change where the mail is or how much there may be.
MAILBOX_PREFIXES = ("mail_", "maildir_", "mailbox_", "namespace/", "quota")
MAILBOX_FIELDS = (
    "mail_driver",
    "mail_home",
    "mail_inbox_path",
    "mail_path",
    "quota_message_count",
    "quota_storage_size",
)
HARMLESS_FIELDS = (
    *("mail_access_groups", "mail_alt_path", "mail_cache_path", "mail_debug", "mail_fsync", "mail_index_path"),
    *("mail_index_private_path", "mail_max_keyword_length", "mail_max_userip_connections", "mail_plugins"),
    *("mail_privileged_group", "mail_replica", "maildir_stat_dirs", "quota_vsizes"),
)
HARMLESS_PREFIXES = (
    *("mail_attribute", "mail_log", "mailbox_list_index", "quota_clone", "quota_exceeded_message", "quota_grace"),
    *("quota_over", "quota_rule", "quota_status", "quota_storage_grace", "quota_warning"),
)
# What Dovecot 2.4 ignores, and has in its place.
RENAMED_FIELDS = {"mail": "mail_path", "quota_rule": "quota_storage_size"}
PASSWD_SIZE = 512  # octets, more than a struct passwd has on any system


class Account:
    """A recipient in a user database.

    userid: the name there. known: whether the database says that the user exists; if not, only the Maildir can tell.
    home, path: the home directory and the Maildir; "" if the database does not say. limits: the octets and messages
    that the Maildir may have; None if the database does not say.
    """

    def __init__(
        self,
        userid: str,
        identity: Identity,
        known: bool = True,
        home: str = "",
        path: str = "",
        limits: tuple[int, int] | None = None,
    ) -> None:
        self.userid, self.identity, self.known = userid, identity, known
        self.home, self.path, self.limits = home, path, limits


class MaildirUsers:
    """No user database: a user exists if the Maildir exists."""

    def __init__(self) -> None:
        self._identity = Identity.of_process()

    def find(self, userid: str) -> Account:
        """The user's account."""
        return Account(userid, self._identity, known=False)


class PasswdUsers:
    """The accounts of this host, see getpwnam(3). min_uid: accounts with a lower user id get no mail."""

    def __init__(self, min_uid: int) -> None:
        self._min_uid = min_uid

    def find(self, userid: str) -> Account:
        """The user's account. Raises UserUnknown and StoreUnavailable."""
        import pwd

        try:
            entry = pwd.getpwnam(userid)
        except KeyError:
            if error := account_error(userid):
                log.error("user database unavailable", user=userid, cause=os.strerror(error))
                raise StoreUnavailable from None
            raise UserUnknown from None
        if entry.pw_uid < max(self._min_uid, 1) or entry.pw_uid == NOBODY:
            raise UserUnknown
        groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
        return Account(entry.pw_name, Identity(entry.pw_uid, entry.pw_gid, groups), home=entry.pw_dir)


def is_in_group(user: str, group: str) -> bool:
    """Whether the user is a member of the group, see group(5), or has it as primary group."""
    import grp
    import pwd

    try:
        entry = grp.getgrnam(group)
        return user in entry.gr_mem or pwd.getpwnam(user).pw_gid == entry.gr_gid
    except KeyError:
        return False


def account_error(name: str) -> int:
    """The errno of a failed look-up of an account, which the module pwd does not report; 0 if it has not failed.

    Source: getpwnam_r(3).
    """
    import ctypes

    entry, strings = ctypes.create_string_buffer(PASSWD_SIZE), ctypes.create_string_buffer(READ_SIZE)
    result = ctypes.c_void_p()
    error: int = ctypes.CDLL(None).getpwnam_r(
        name.encode(), entry, strings, ctypes.c_size_t(len(strings)), ctypes.byref(result)
    )
    return error


class DovecotUsers:
    """Dovecot's user database, asked over the socket of its authentication service.

    Source: Dovecot's documentation of its authentication protocol, the part for masters.
    """

    def __init__(self, path: str, backoff: Backoff) -> None:
        self._path, self._backoff = path, backoff
        self._service: DovecotService | None = None
        self._version = self._requests = 0

    def find(self, userid: str) -> Account:
        """The user's account. Raises UserUnknown and StoreUnavailable."""
        try:
            return self._account_of(userid)
        except (Unavailable, ValueError) as error:
            log.error("user database unavailable", user=userid, cause=error)
            raise StoreUnavailable from None

    def _account_of(self, userid: str) -> Account:
        """The user's account. Raises UserUnknown, Unavailable, and ValueError for an answer that cannot be used."""
        userid, fields = self._look_up(userid)
        check_dovecot_fields(fields, self._version)
        home = fields.get("mail_home") or fields.get("home", "")
        uid, gid = as_id(fields.get("uid", str(os.geteuid()))), as_id(fields.get("gid", str(os.getegid())))
        if uid == 0:
            raise ValueError("root cannot have a mailbox")
        user = fields.get("system_groups_user")
        groups = os.getgrouplist(user, gid) if user else [gid]
        path, limits = maildir_in_dovecot_fields(fields, home), limits_in_dovecot_fields(fields)
        return Account(userid, Identity(uid, gid, groups), home=home, path=path, limits=limits)

    def _look_up(self, userid: str) -> tuple[str, dict[str, str]]:
        """The userid and fields of Dovecot's answer. Raises UserUnknown, Unavailable and ValueError.

        If Dovecot has closed the connection, asks again on a new one.
        """
        if self._service:
            try:
                return self._look_up_on(self._service, userid)
            except ServiceClosed:
                self._close()
        if self._backoff.is_active():
            raise Unavailable(f"{self._path}: not asked again yet after a timeout")
        try:
            self._service = DovecotService(self._path)
            self._service.say("VERSION", "1", "1")
            return self._look_up_on(self._service, userid)
        except ServiceClosed:
            self._close()
            raise

    def _close(self) -> None:
        if self._service:
            self._service.close()
            self._service = None

    def _look_up_on(self, service: DovecotService, userid: str) -> tuple[str, dict[str, str]]:
        """The answer on this connection. A timeout closes it and starts the back-off. Raises as _look_up() does."""
        self._requests += 1
        identity = str(self._requests)
        try:
            deadline = time.monotonic() + SERVICE_TIMEOUT
            service.say("USER", identity, userid, "service=lmtp")
            while True:
                if time.monotonic() > deadline:
                    raise ServiceTimeout(f"{self._path}: does not answer")
                verdict, *words = service.hear()
                if verdict == "VERSION":
                    self._version = as_number(words[-1])
                if words and words[0] == identity and verdict in ("USER", "NOTFOUND", "FAIL"):
                    break
        except ServiceTimeout:
            self._close()
            self._backoff.start()
            raise
        if verdict == "NOTFOUND":
            raise UserUnknown
        if verdict == "FAIL":
            raise Unavailable(f"{self._path}: {' '.join(words[1:]) or 'temporary failure'}")
        if len(words) < 2:
            raise ValueError("a user without a name")
        return unescaped(words[1]), {
            name: unescaped(value) for name, _, value in (word.partition("=") for word in words[2:])
        }


def as_id(value: str) -> int:
    """A user id or group id. Raises ValueError."""
    if not value.isdigit() or int(value) >= ID_LIMIT:
        raise ValueError(f"uid or gid {value!r}: must be a number below {ID_LIMIT}")
    return int(value)


def check_dovecot_fields(fields: dict[str, str], version: int) -> None:
    """Raises ValueError if a field may change where the mail is, or how much there may be, in a way that is not known.

    version: the minor version of Dovecot's protocol.
    """
    for name, value in fields.items():
        is_known = name in (*MAILBOX_FIELDS, *HARMLESS_FIELDS) or name.startswith(HARMLESS_PREFIXES)
        is_overridden = name in ("mail_uid", "mail_gid") and "uid" in fields
        if name.startswith(MAILBOX_PREFIXES) and not (is_known or is_overridden):
            raise ValueError(f"{name}={value}: the field is not known, and may move or limit the mailbox; remove it")
    for old, new in RENAMED_FIELDS.items():
        if version >= DOVECOT_24 and old in fields and new not in fields:
            raise ValueError(f"{old}={fields[old]}: Dovecot 2.4 ignores this field; set {new}")


def maildir_in_dovecot_fields(fields: dict[str, str], home: str) -> str:
    """The path of the Maildir by the field mail_path, or mail in Dovecot before 2.4; "" if there is neither.

    Raises ValueError for another kind of mailbox. Source: Dovecot's documentation of mail_path and mail_location.
    """
    driver, inbox = fields.get("mail_driver", "maildir"), fields.get("mail_inbox_path", ".")
    if driver.lower() != "maildir":
        raise ValueError(f"mail_driver={driver}: not maildir")
    if "mail_path" in fields:
        path = absolute_maildir(f"mail_path={fields['mail_path']}", fields["mail_path"], home)
    else:
        path = maildir_in_location(fields.get("mail", ""), home)
    if inbox != "." and absolute_maildir(f"mail_inbox_path={inbox}", inbox, home) != path:
        raise ValueError(f"mail_inbox_path={inbox}: not mail_path; the INBOX of a Maildir++ is the Maildir itself")
    return path


def maildir_in_location(location: str, home: str) -> str:
    """The path in "maildir:path", with or without options; "" if the location is "". Raises ValueError."""
    if not location:
        return ""
    kind, _, rest = location.partition(":")
    path, *settings = rest.split(":")
    elsewhere = [setting for setting in settings if setting.upper().startswith(("INBOX=", "LAYOUT=", "DIRNAME="))]
    if kind != "maildir" or any(setting.lower() != "layout=maildir++" for setting in elsewhere):
        raise ValueError(f"mail={location}: not a Maildir++ with an absolute path")
    return absolute_maildir(f"mail={location}", path.replace("%h", home) if home else path, home)


def absolute_maildir(field: str, path: str, home: str) -> str:
    """The path in a field, in which ~/ may stand for the home directory. Raises ValueError for a relative one."""
    whole = home + path[1:] if home and f"{path}/".startswith("~/") else path
    if not whole.startswith("/") or not whole.strip("/") or "%" in whole:
        raise ValueError(f"{field}: not a Maildir++ with an absolute path")
    return whole.rstrip("/")


def limits_in_dovecot_fields(fields: dict[str, str]) -> tuple[int, int] | None:
    """The octets and messages that the Maildir may have, 0 for no limit; None if no field says it. Raises ValueError.

    quota_storage_size and quota_message_count in Dovecot 2.4; before, the largest limits of all quota_rule.
    """
    size, count = fields.get("quota_storage_size"), fields.get("quota_message_count")
    if size is not None or count is not None:
        try:
            octets = 0 if size in (None, "unlimited") else as_octets(size.lower().replace("ib", "b"))
            messages = 0 if count in (None, "unlimited") else as_number(count)
        except ValueError as error:
            raise ValueError(f"quota_storage_size={size or ''} quota_message_count={count or ''}: {error}") from None
        return octets, messages
    rules = [fields[name] for name in fields if name.startswith("quota_rule")]
    limits = [parse_quota_rule(rule) for rule in rules if rule.startswith("*:")]
    return (max(octets for octets, _ in limits), max(number for _, number in limits)) if limits else None


def parse_quota_rule(rule: str) -> tuple[int, int]:
    """The octets and messages of a rule such as "*:storage=1G:messages=1000". Storage without a unit is in KiB.

    Raises ValueError. Source: Dovecot's documentation of its plugin quota.
    """
    octets = messages = 0
    folder, *limits = rule.split(":")
    for limit in limits:
        name, _, value = limit.partition("=")
        if limit == "ignore":
            return 0, 0
        if folder != "*" or name not in ("storage", "bytes", "messages"):
            raise ValueError(f"quota_rule={rule}: only storage, bytes, messages and ignore for * are known")
        try:
            if name == "messages":
                messages = as_number(value)
            else:
                octets = as_octets(f"{value}K" if name == "storage" and value.isdigit() else value)
        except ValueError as error:
            raise ValueError(f"quota_rule={rule}: {value!r} {error}") from None
    return octets, messages


# ======================================================================
# Mailstore
#
# Owns the way from a recipient to a mailbox, and the interface of a store.
# Must not know LMTP.
# ======================================================================


class MaildirStore:
    """A store of Maildirs, one for each user, at the path that the user database or the option maildir_path gives.

    Another store must have the attributes and methods below. Router makes the store from a Config before workers fork.
    Then the store may raise ConfigError, but must open no connection. Later the store logs the cause before it raises
    StoreUnavailable; Delivery logs an OSError. A folder is a text; every mailbox has INBOX.

    store.find(recipient, is_last) -> mailbox
                                        Raises UserUnknown and StoreUnavailable. is_last: whether there is no other way
                                        to divide the address, so that a mailbox may be made for an unknown user.
    store.shared() -> mailbox or None   The mailbox of the shared folders.

    A mailbox is used in one transaction:

    mailbox.path                        Its name in the log; with the owner, its identity.
    mailbox.owner                       If all mailboxes have one owner, a large message is spooled in one of them.
    mailbox.key(folder) -> str          Names a folder in records and in the log, the same for every process.
    mailbox.exists() -> bool            Whether the mailbox of the shared folders exists.
    mailbox.make()                      Makes the mailbox if it is missing. Raises OSError.
    mailbox.resolve(name, similar=...) -> folder or None
                                        The existing folder of a name as people write it. Raises OSError.
    mailbox.forget_folders()            Frees what resolve() has kept for the next call.
    mailbox.new_folder(name) -> folder  The folder of a name, which place() makes if it is missing. Raises ValueError.
    mailbox.is_one_of(folder, names)    Whether the folder has one of these names, as people write them.
    mailbox.check_quota(folder, octets, messages)
                                        Raises MailboxFull if so much more would exceed the quota.
    mailbox.spool() -> Draft            A file for a large message that is still arriving. Raises OSError.
    mailbox.place(message, folder, flags, may_move) -> placed
                                        Puts the message where readers can see it. Raises OSError and ValueError.

    Many messages may be placed before the first is synced. take_back() may come before or after sync(), close() last:

    placed.name                         Names the message in the log.
    placed.sync()                       Makes it durable, or else takes it back and raises OSError.
    placed.take_back()                  Removes it again, or logs why it cannot.
    placed.close()                      Frees what it holds.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        self._variables = template_variables(config.maildir_path)
        if config.userdb == "maildir" and "h" in self._variables:
            raise ConfigError("maildir_path: %h needs userdb: passwd or dovecot")
        check_folder_names(config)
        self._config = config
        self._identity = Identity.of_process()
        self._users: MaildirUsers | PasswdUsers | DovecotUsers = MaildirUsers()
        if config.userdb == "passwd":
            self._users = PasswdUsers(config.passwd_min_uid)
        elif config.userdb == "dovecot":
            backoff = Backoff(f"{config.configdirectory}/userdb.backoff")
            self._users = DovecotUsers(config.userdb_socket_path, backoff)

    def find(self, recipient: Recipient, is_last: bool = True) -> Maildir:
        """See above."""
        has_domain_in_user = self._config.virtdomains != "off" and "@" in recipient.user
        if not recipient.user or has_domain_in_user or not is_safe_name(recipient.userid):
            raise UserUnknown
        account = self._users.find(recipient.userid)
        path = (account.path or self._path_of(account, recipient)).rstrip("/")
        try:
            missing = not self._has_maildir(path, account.identity)
        except OSError as error:
            self._check_absence(path, account, error, is_last)
            missing = True
        except ValueError as error:  # a NUL, or a lone surrogate
            raise self._inaccessible(path, error) from None
        return Maildir(path, account.identity, self._config, missing, account.limits)

    def shared(self) -> Maildir | None:
        """The Maildir of the shared folders; None if the configuration names none."""
        path = self._config.shared_maildir
        return Maildir(path, self._identity, self._config) if path else None

    def _path_of(self, account: Account, recipient: Recipient) -> str:
        """The path of the recipient's Maildir by the option maildir_path. Raises UserUnknown and StoreUnavailable."""
        if "h" in self._variables and not (account.home.startswith("/") and account.home.strip("/")):
            raise self._inaccessible(recipient.userid, "the user's home directory is missing, relative or /")
        user, domain = recipient.user, recipient.domain
        if account.userid != recipient.userid:  # the database has another name for the user
            user, _, domain = account.userid.partition("@")
        names = {"u": account.userid, "n": user, "d": domain or self._config.defaultdomain}
        path = expand(self._config.maildir_path, {**names, "h": account.home, "p": self._config.partition})
        used = [name for variable, name in names.items() if variable in self._variables]
        if not all(map(is_safe_name, used)) or max(map(len, os.fsencode(path).split(b"/"))) > NAME_LIMIT:
            raise UserUnknown
        return path

    def _has_maildir(self, path: str, identity: Identity) -> bool:
        """Whether new/ exists; False if only cur/ does. Raises OSError if neither does, or it cannot be found out."""
        directory = Directory(path, identity)
        with identity:
            try:
                os.close(directory.open("new"))
            except FileNotFoundError:
                os.close(directory.open("cur"))  # then only new/ is missing, and the user exists
                return False
        return True

    def _check_absence(self, path: str, account: Account, error: OSError, is_last: bool) -> None:
        """Raises UserUnknown or StoreUnavailable, unless the Maildir does not exist and can be made."""
        if not account.known and not is_last and error.errno in ABSENT:
            raise UserUnknown
        is_certain = error.errno == errno.ENOENT if account.known else error.errno in ABSENT and self._is_spool_there()
        if not is_certain:
            raise self._inaccessible(path, error)
        may_be_made = error.errno == errno.ENOENT and (account.known or self._is_autocreated(account.userid))
        try:
            with account.identity:
                obstacle = trace_of_cyrus(path, self._config.partition)
                if may_be_made and not obstacle:
                    obstacle = missing_right_to_make(path)
        except OSError as failure:
            raise self._inaccessible(path, failure) from None
        if obstacle:
            raise self._inaccessible(path, obstacle)
        if not may_be_made:
            raise UserUnknown

    def _inaccessible(self, mailbox: str, cause: object) -> StoreUnavailable:
        """The error for a mailbox that cannot be used, after it has been logged."""
        log.error("mailbox not accessible", mailbox=mailbox, cause=cause)
        return StoreUnavailable()

    def _is_autocreated(self, userid: str) -> bool:
        """Whether autocreate_post is on, and autocreate_users has the user, or one of the user's groups."""
        wanted = self._config.autocreate_users
        if not self._config.autocreate_post:
            return False
        if "anyone" in wanted or userid in wanted:
            return True
        return any(is_in_group(userid, name.removeprefix("group:")) for name in wanted if name.startswith("group:"))

    def _is_spool_there(self) -> bool:
        """Whether the spool exists. An empty spool may be an unmounted disk, unless autocreate_post is on."""
        spool = self._config.partition
        try:
            with os.scandir(spool or "/") as entries:
                return self._config.autocreate_post or any(entries)
        except OSError:
            return False


def trace_of_cyrus(path: str, spool: str) -> str:
    """What shows that Cyrus' own mail is in place of a Maildir, or in the spool if the Maildir is there; else ""."""
    in_spool = [f"{spool}/stage."] if spool and path.startswith(f"{spool}/") else []
    for trace in (f"{path}/cyrus.header", *in_spool):
        if os.path.exists(trace):
            return f"{trace} is of Cyrus, whose mail is not in Maildirs; lmtpd needs a partition of its own"
    return ""


def missing_right_to_make(path: str) -> str:
    """Why the acting user cannot make the missing directory; "" if it can be tried."""
    parent = nearest_directory(path)
    if os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        return ""
    return f"it is missing, and uid {os.geteuid()} has no right to make it in {parent}"


def check_folder_names(config: Config) -> None:
    """Raises ConfigError if an option names a folder that cannot exist."""
    for setting in ("autocreate_inbox_folders", "autocreate_subscribe_folders", "quota_exclude_folders"):
        try:
            for name in getattr(config, setting):
                folder_parts(name, config)
        except ValueError as error:
            raise ConfigError(f"{setting}: {error}") from None


def is_safe_name(name: str) -> bool:
    """Whether the name, which a client chose, may be that of a directory in the store."""
    return bool(name) and not name.startswith(".") and "/" not in name and is_printable(name)


# ======================================================================
# Records
#
# Owns the database of delivered messages.
# Must not know what follows from a record.
# ======================================================================

DATABASE_PATIENCE = 5.0  # seconds to wait for the lock of the duplicate database
DAY = 86400  # seconds
EXPIRED_AT_ONCE = 10  # expired records that are deleted for each message, besides one for each new record


class Duplicates:
    """The messages that were delivered lately, and where, in an SQLite database that all processes share.

    No method raises. While the database cannot be used, no message is a duplicate, and the log says why.
    """

    def __init__(self, config: Config) -> None:
        self._path = config.duplicate_db_path or f"{config.configdirectory}/deliver.db"
        self._expiry = config.duplicate_expiry
        self._database: Database | None = None
        self._backoff = Backoff(f"{config.configdirectory}/deliver.backoff")

    def prepare(self) -> None:
        """Imports what is needed, before workers fork."""
        try:
            import sqlite3  # noqa: F401
        except ImportError:
            return  # the first use logs it

    def has(self, message_id: str, date: str, mailbox: str) -> bool:
        """Whether a message with that Message-ID and Date has been delivered to the mailbox."""
        query = "SELECT 1 FROM deliveries WHERE message_id = ? AND date = ? AND mailbox = ? AND at >= ?"
        return bool(self._execute([(query, (message_id, date, mailbox, time.time() - self._expiry))]))

    def add(self, message_id: str, date: str, mailboxes: Sequence[str]) -> None:
        """Records that a message has been delivered to the mailboxes, and deletes some expired records."""
        now = time.time()
        insert = "INSERT OR REPLACE INTO deliveries (message_id, date, mailbox, at) VALUES (?, ?, ?, ?)"
        # The oldest records have the lowest numbers.
        oldest = "SELECT rowid FROM deliveries ORDER BY rowid LIMIT ?"
        self._execute(
            [
                ("BEGIN IMMEDIATE", ()),
                *((insert, (message_id, date, mailbox, now)) for mailbox in mailboxes),
                (
                    # A time in the future was written while the clock was wrong.
                    f"DELETE FROM deliveries WHERE at NOT BETWEEN ? AND ? AND rowid IN ({oldest})",
                    (now - self._expiry, now + DAY, EXPIRED_AT_ONCE + len(mailboxes)),
                ),
                ("COMMIT", ()),
            ]
        )

    def _execute(self, statements: Sequence[tuple[str, Sequence[object]]]) -> list[object]:
        """The rows that the last of the statements returns."""
        if not self._database and self._backoff.is_active():
            return []
        try:
            import sqlite3
        except ImportError as error:
            self._give_up(error)
            return []
        try:
            self._database = self._database or self._open()
            for statement, values in statements:
                rows = self._database.execute(statement, values).fetchall()
            return rows
        except (sqlite3.Error, OSError, ValueError) as error:  # ValueError: a path is not UTF-8
            self._give_up(error)
            self._close()
            return []

    def _give_up(self, error: Exception) -> None:
        log.error("duplicate database unavailable", database=self._path, cause=error)
        self._backoff.start()

    def _open(self) -> Database:
        import sqlite3

        database = sqlite3.connect(self._path, timeout=DATABASE_PATIENCE, isolation_level=None)
        # If the system crashes, a lost record means a second copy, not a lost message.
        database.execute("PRAGMA synchronous = NORMAL")
        deadline = time.monotonic() + DATABASE_PATIENCE
        while not has_table(database, "deliveries"):
            try:
                make_deliveries(database)
            except sqlite3.OperationalError as error:
                # Another process makes the table, and SQLite does not wait for a change of the journal mode.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        return database

    def _close(self) -> None:
        import sqlite3

        database, self._database = self._database, None
        try:
            if database:
                database.close()
        except sqlite3.Error:
            return


def has_table(database: Database, name: str) -> bool:
    """Whether the database has a table of that name. Raises sqlite3.Error."""
    return bool(database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchall())


def make_deliveries(database: Database) -> None:
    """Makes the table of deliveries, in place of that of version 0.1.0, which had no dates. Raises sqlite3.Error."""
    database.execute("PRAGMA page_size = 1024")  # each record writes two pages
    database.execute("PRAGMA journal_mode = WAL")
    columns = "message_id TEXT, date TEXT, mailbox TEXT, at REAL, UNIQUE (message_id, date, mailbox)"
    with database:
        database.execute("BEGIN IMMEDIATE")
        database.execute(f"CREATE TABLE IF NOT EXISTS deliveries ({columns})")
        database.execute("DROP TABLE IF EXISTS delivered")


# ======================================================================
# Delivery
#
# Owns what happens to one message and all its recipients. Errors of the store
# become replies here.
# Must not know the wire.
# ======================================================================

BATCH = 200  # placements that are open at a time; each holds a descriptor
MESSAGE_ID_LIMIT = 998  # characters; a longer Message-ID or Date identifies nothing, RFC 5322 section 2.1.1

USER_UNKNOWN = Reply(550, "5.1.1", "User unknown")
MAILBOX_FULL = Reply(452, "4.2.2", "Mailbox is full, try again later")
MAILBOX_FULL_PERMANENT = Reply(552, "5.2.2", "Mailbox is full")
MAILBOX_UNUSABLE = Reply(550, "5.2.1", "Mailbox does not accept messages")
STORAGE_FULL = Reply(452, "4.3.1", "Mail storage is full, try again later")
STORAGE_FAILED = Reply(451, "4.3.0", "Mail storage failed, try again later")


class Destination:
    """A recipient's mailbox. detail: the folder's name; "" for the INBOX. ignores_quota: deliver even if over quota."""

    def __init__(self, recipient: Recipient, mailbox: Maildir, detail: str, ignores_quota: bool) -> None:
        self.recipient, self.mailbox, self.detail = recipient, mailbox, detail
        self.ignores_quota = ignores_quota


class Envelope:
    """A transaction's sender and recipients. reverse_path: None for <>. mailboxes: see remembered()."""

    def __init__(self, reverse_path: Address | None) -> None:
        self.reverse_path = reverse_path
        self.destinations: list[Destination] = []
        self.mailboxes: dict[tuple[str, tuple[int, int]], Maildir] = {}


class Placement:
    """A message on its way into one folder.

    key: the folder's name in records and in the log. event: the result, for the log. placed: the message in the folder,
    if it has been stored. twin: an earlier placement in the same folder, of which this one is a duplicate. failure: the
    reply if it failed.
    """

    __slots__ = ("event", "failure", "flags", "folder", "key", "mailbox", "message", "placed", "twin")

    def __init__(self, message: Message, mailbox: Maildir, folder: str, flags: Sequence[str] = ()) -> None:
        self.message, self.mailbox, self.folder, self.flags = message, mailbox, folder, flags
        self.key = mailbox.key(folder)
        self.event = "delivered"
        self.placed: Placed | None = None
        self.twin: Placement | None = None
        self.failure: Reply | None = None

    @property
    def is_stored(self) -> bool:
        """Whether this placement has added a message to the folder."""
        return self.placed is not None and not self.failure

    def fail(self, reply: Reply) -> None:
        """Sets the result: not delivered."""
        self.event, self.failure = "not delivered", reply


class Delivery:
    """The delivery of a message to one recipient, which has one placement or more.

    failure: the client's reply if something has failed; else None.
    """

    __slots__ = ("destination", "failure", "placements")

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self.placements: list[Placement] = []
        self.failure: Reply | None = None

    def fail(self, reply: Reply, placement: Placement | None = None) -> None:
        """Adds a failure, of a placement or of them all.

        A temporary failure outranks a permanent one: the client must keep the message and try again.
        """
        if placement:
            placement.fail(reply)
        if not self.failure or reply.code < self.failure.code:
            self.failure = reply


class Router:
    """Finds the mailbox and the folder of each recipient."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        self._config = config
        self._store = MaildirStore(config)
        self._listed: Maildir | None = None

    def find(self, address: Address, envelope: Envelope, size: int, ignores_quota: bool) -> Destination:
        """The destination of the copy for an address. size: the octets that the client has announced; 0 if it has not.

        Raises LmtpError if the user is unknown, the mailbox full, or the store unavailable.
        """
        try:
            destination = self._destination(address, envelope, ignores_quota)
            strict = self._config.lmtp_strict_quota
            # The folder matters only if some folders do not count.
            folder = self.folder_of(destination) if self._config.quota_exclude_folders else INBOX
            destination.mailbox.check_quota(folder, size if strict else 0, int(strict))
        except StoreError as error:
            if not (isinstance(error, MailboxFull) and ignores_quota):
                raise LmtpError(reply_to(error, self._config)) from None
        return destination

    def folder_of(self, destination: Destination) -> str:
        """The folder for the recipient's copy, existing or not: that of the detail, else the INBOX.

        Raises StoreError and LmtpError.
        """
        detail, mailbox = destination.detail, destination.mailbox
        if not detail:
            return INBOX
        folder = self._resolve(mailbox, detail)
        if destination.recipient.is_shared:
            if not folder:  # it has been removed meanwhile
                raise UserUnknown
            return folder
        if folder is None and self._config.lmtp_detail_create:
            try:
                folder = mailbox.new_folder(detail)
            except ValueError:
                return INBOX
        return INBOX if folder is None or mailbox.is_one_of(folder, self._excluded_folders()) else folder

    def _destination(self, address: Address, envelope: Envelope, ignores_quota: bool) -> Destination:
        """The recipient's mailbox, else the postmaster's or the catch-all user's. Raises StoreError and LmtpError."""
        recipients = recipients_of(address, self._config)
        last = recipients[-1]
        if last.is_shared:
            if shared := self._shared(last, envelope):
                return Destination(last, shared, last.detail, ignores_quota)
        elif found := self._first_user(recipients, envelope):
            recipient, mailbox = found
            return Destination(recipient, mailbox, recipient.detail, ignores_quota)
        substitutes = [self._config.lmtp_catchall_mailbox]
        if last.is_postmaster:
            substitutes.insert(0, self._config.postmaster)
        for userid in filter(None, substitutes):
            local, _, domain = userid.partition("@")
            if found := self._first_user(recipients_of(Address(local, domain), self._config), envelope):
                return Destination(last, found[1], "", ignores_quota)
            log.warning("postmaster or catch-all user does not exist", user=userid)
        raise UserUnknown

    def _shared(self, recipient: Recipient, envelope: Envelope) -> Maildir | None:
        """The mailbox of the shared folders, if it has the recipient's; else None. Raises StoreError and LmtpError."""
        if not (shared := self._store.shared()):
            return None
        shared = remembered(shared, envelope)
        if not shared.exists():
            log.error("mailbox not accessible", mailbox=shared.path, cause="the directory does not exist")
            raise StoreUnavailable
        return shared if self._resolve(shared, recipient.detail) else None

    def _first_user(self, recipients: Sequence[Recipient], envelope: Envelope) -> tuple[Recipient, Maildir] | None:
        """The first of the recipients who exists, and the mailbox; None if there is none. Raises StoreUnavailable."""
        for recipient in recipients:
            try:
                mailbox = self._store.find(recipient, is_last=recipient is recipients[-1])
            except UserUnknown:
                continue
            return recipient, remembered(mailbox, envelope)
        return None

    def _resolve(self, mailbox: Maildir, detail: str) -> str | None:
        """The existing folder that a sub-address names. Raises LmtpError."""
        if self._listed is not mailbox:
            if self._listed:
                self._listed.forget_folders()  # one list at a time: there may be many mailboxes, each of many folders
            self._listed = mailbox
        try:
            return mailbox.resolve(detail, similar=self._config.lmtp_fuzzy_mailbox_match)
        except OSError as error:
            raise LmtpError(reply_to(error, self._config, mailbox.path)) from None

    def _excluded_folders(self) -> list[str]:
        """The names of the folders to which no sub-address leads, because of their special use (RFC 6154)."""
        uses = [use.lower() for use in self._config.lmtp_exclude_specialuse]
        return [name for use, name in self._config.special_uses.items() if use in uses]


class DeliveryAgent:
    """Delivers messages to the mailboxes of their recipients. router: finds these."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        self._config = config
        self.router = Router(config)
        self._identity = Identity.of_process()
        self._duplicates = Duplicates(config) if config.duplicatesuppression else None

    def prepare(self) -> None:
        """Gets ready for many messages, before workers fork."""
        if self._duplicates:
            self._duplicates.prepare()

    def drafts(self, envelope: Envelope) -> Iterator[Draft]:
        """Spool files for a message that is too large for memory, one after the other on different file systems.

        A draft in a mailbox becomes the message there. If the mailboxes have different owners, the draft is in
        configdirectory, so that no user can write to another user's mail. Raises OSError if no draft can be made.
        """
        mailboxes = list(dict.fromkeys(destination.mailbox for destination in envelope.destinations))
        if len({mailbox.owner for mailbox in mailboxes}) > 1:
            draft = Directory(self._config.configdirectory, self._identity).new_draft("")
            try:
                draft.unlink()
            except OSError:
                draft.discard()
                raise
            yield draft
            return
        devices: set[int] = set()
        for mailbox in mailboxes:
            try:
                draft = mailbox.spool()
            except OSError as error:
                if not devices and mailbox is mailboxes[-1]:
                    raise
                log.warning("spooling elsewhere", mailbox=mailbox.path, cause=error)
                continue
            device = draft.device()
            if device in devices:
                draft.discard()
                continue
            devices.add(device)
            yield draft

    def refusal(self, incoming: Incoming) -> Reply | None:
        """The reply to a message that cannot be delivered to anybody; None if it can."""
        return storage_reply(incoming.failure) if incoming.failure else incoming.refusal

    def deliver(self, incoming: Incoming, envelope: Envelope, delivered: Reply) -> list[Reply]:
        """Delivers to every recipient; the reply for each, in order: delivered, or the recipient's failure.

        The message is placed in many mailboxes before the first is synced, so that the file system can commit its
        journal once for all of them.
        """
        started = time.monotonic()
        deliveries = [Delivery(destination) for destination in envelope.destinations]
        if refusal := self.refusal(incoming):
            for delivery in deliveries:
                delivery.fail(refusal)
        else:
            self._place_all(incoming.message, deliveries)
        replies = []
        for delivery in deliveries:
            replies.append(reply := delivery.failure or delivered)
            log_delivery(delivery, reply, incoming.message, envelope, started)
        return replies

    def plan(self, message: Message, destination: Destination) -> list[Placement]:
        """The placements of a message for one recipient, at least one. Raises StoreError, LmtpError and OSError."""
        destination.mailbox.make()
        if self._config.lmtp_delivered_to:
            message = message.with_field(f"Delivered-To: {destination.recipient.address}\n".encode())
        return [Placement(message, destination.mailbox, self.router.folder_of(destination))]

    def _place_all(self, message: Message, deliveries: Sequence[Delivery]) -> None:
        """Delivers to all recipients, and updates the duplicate database."""
        first_in: dict[str, Placement] = {}
        batch: list[Delivery] = []
        waiting = 0
        for delivery in deliveries:
            self._place(message, delivery, first_in, delivery is deliveries[-1])
            batch.append(delivery)
            waiting += len(delivery.placements)
            if waiting >= BATCH or delivery is deliveries[-1]:
                self._settle(message, batch, first_in)
                batch, waiting = [], 0
        placements = [placement for delivery in deliveries for placement in delivery.placements]
        stored = [placement.key for placement in placements if placement.is_stored]
        if stored and self._duplicates and is_identified(message):
            self._duplicates.add(message.message_id, message.date, stored)

    def _place(self, message: Message, delivery: Delivery, first_in: dict[str, Placement], is_last: bool) -> None:
        """Puts a recipient's copies into the folders that do not have the message yet, until one of them fails.

        first_in: the first placement in each folder, by its key. is_last: whether no other recipient follows.
        """
        try:
            delivery.placements = self.plan(message, delivery.destination)
        except Exception as error:
            delivery.fail(reply_to(error, self._config, delivery.destination.mailbox.path))
            return
        for number, placement in enumerate(delivery.placements, 1):
            # The last placement of a message may take its draft away.
            may_move = is_last or placement.message is not message
            for later in delivery.placements[number:]:
                may_move = may_move and later.message is not placement.message
            try:
                self._place_one(placement, delivery.destination, first_in, may_move)
            except Exception as error:
                delivery.fail(reply_to(error, self._config, placement.key), placement)
                del delivery.placements[number:]
                return

    def _place_one(
        self, placement: Placement, destination: Destination, first_in: dict[str, Placement], may_move: bool
    ) -> None:
        """Places the message unless the folder has it already. Raises StoreError, OSError and ValueError."""
        message, mailbox = placement.message, placement.mailbox
        placement.twin = first_in.get(placement.key) if self._duplicates else None
        if placement.twin or self._has_got(placement.key, message):
            placement.event = "duplicate"
            return
        if self._config.lmtp_strict_quota and not destination.ignores_quota:
            mailbox.check_quota(placement.folder, message.size, 1)
        placement.placed = mailbox.place(message, placement.folder, placement.flags, may_move)
        first_in[placement.key] = placement

    def _has_got(self, key: str, message: Message) -> bool:
        if not self._duplicates or not is_identified(message):
            return False
        return self._duplicates.has(message.message_id, message.date, key)

    def _settle(self, message: Message, deliveries: Sequence[Delivery], first_in: dict[str, Placement]) -> None:
        """Makes the placements of each recipient durable; if one of them fails, takes that recipient's others back.

        Frees messages other than the one that was sent.
        """
        for delivery in deliveries:
            for placement in delivery.placements:
                if not delivery.failure:
                    self._sync(placement, delivery, first_in)
            if delivery.failure:
                for placement in delivery.placements:
                    self._take_back(placement, delivery.failure)
            for placement in delivery.placements:
                if placement.placed:
                    placement.placed.close()
                if placement.message is not message:
                    placement.message.discard()

    def _sync(self, placement: Placement, delivery: Delivery, first_in: dict[str, Placement]) -> None:
        """Makes a placement durable; first places it anew if its twin has failed. An error becomes the failure."""
        try:
            if placement.twin and placement.twin.failure:  # another recipient's failure is not this one's
                if (first := first_in.get(placement.key)) and first.failure:
                    del first_in[placement.key]
                placement.event = "delivered"
                self._place_one(placement, delivery.destination, first_in, may_move=False)
            if placement.placed:
                placement.placed.sync()
        except Exception as error:
            delivery.fail(reply_to(error, self._config, placement.key), placement)

    def _take_back(self, placement: Placement, failure: Reply) -> None:
        if not placement.is_stored or not placement.placed:
            return
        placement.fail(failure)
        placement.placed.take_back()


def reply_to(error: Exception, config: Config, mailbox: str = "") -> Reply:
    """The reply to an exception. Logs it, unless it is an LmtpError, or a StoreError other than MailboxFull."""
    if isinstance(error, LmtpError):
        return error.reply
    if isinstance(error, UserUnknown):
        return USER_UNKNOWN
    if isinstance(error, MailboxFull):
        log.warning("over quota", mailbox=error.mailbox, used=error.used, limit=error.limit)
        return MAILBOX_FULL_PERMANENT if config.lmtp_over_quota_perm_failure else MAILBOX_FULL
    if isinstance(error, StoreUnavailable):
        return MAILBOX_UNUSABLE if error.permanent else STORAGE_FAILED
    if isinstance(error, OSError):
        log.error("delivery failed", mailbox=mailbox, cause=error)
        return storage_reply(error)
    log.traceback("delivery failed", mailbox=mailbox)
    return STORAGE_FAILED


def storage_reply(error: OSError) -> Reply:
    """The reply to a client whose message could not be stored."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return STORAGE_FULL if full else STORAGE_FAILED


def remembered(mailbox: Maildir, envelope: Envelope) -> Maildir:
    """The transaction's own object for this mailbox, so that its folders are listed once for all recipients."""
    return envelope.mailboxes.setdefault((mailbox.path, mailbox.owner), mailbox)


def log_delivery(delivery: Delivery, reply: Reply, message: Message, envelope: Envelope, started: float) -> None:
    """Logs one line for each placement. started: when the delivery began, by time.monotonic()."""
    path = delivery.destination.mailbox.path
    parts = [(each.event, each.key, each.placed.name if each.placed else "") for each in delivery.placements]
    for event, mailbox, file in parts or [("not delivered", path, "")]:
        log.info(
            event,
            msgid=message.message_id,
            size=message.size,
            sender=f"<{envelope.reverse_path or ''}>",
            recipient=f"<{delivery.destination.recipient.address}>",
            mailbox=mailbox,
            file=file,
            reply=reply,
            ms=round((time.monotonic() - started) * 1000),
        )


def is_identified(message: Message) -> bool:
    """Whether the client sent a Message-ID and a Date, by which a second copy can be recognized."""
    says_something = bool(message.message_id.strip("<> "))  # broken senders give every message an empty one
    is_short = max(len(message.message_id), len(message.date)) <= MESSAGE_ID_LIMIT
    return message.has_message_id and says_something and bool(message.date) and is_short


# ======================================================================
# Authentication
#
# Owns SASL mechanisms, password checks, what is offered, and who may deliver.
# Must not know mail.
# ======================================================================

# A mechanism is a generator: it yields challenges, is sent responses, and returns the
# user's name. It raises AuthenticationFailed, Unavailable or ValueError,
# the last for a malformed response.

PLAINTEXT_MECHANISMS = ("PLAIN", "LOGIN")
SCRAM_MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-1")
SALT_MINIMUM, ITERATIONS_MINIMUM = 12, 4096  # octets; RFC 7677 section 4
TRUSTED_USER = "postman"  # Cyrus' name for a client on a trusted connection


class AuthenticationFailed(Exception):
    """The client has not proved its identity. The text says why, for the log and not for the client.

    user: the identity that the client claims; "" if unknown.
    """

    def __init__(self, cause: str, user: str = "") -> None:
        super().__init__(cause)
        self.user = user


class UnknownMechanism(Exception):
    """The client may not use that mechanism, or there is none of that name."""


class EncryptionRequired(Exception):
    """The mechanism needs a stronger encryption than the connection has."""


def external(identity: str) -> Mechanism:
    """EXTERNAL (RFC 4422 appendix A): the connection has proved the identity."""
    response = yield b""
    return authorized(identity, response.decode("utf-8"))


def plain(check: Callable[[str, str], None]) -> Mechanism:
    """PLAIN (RFC 4616)"""
    response = yield b""
    authorization, user, password = response.decode("utf-8").split("\0")
    check(user, password)
    return authorized(user, authorization)


def login(check: Callable[[str, str], None]) -> Mechanism:
    """LOGIN, which has no RFC, for clients without PLAIN"""
    user = yield b"Username:"
    password = yield b"Password:"
    check(user.decode("utf-8"), password.decode("utf-8"))
    return user.decode("utf-8")


def scram(name: str, verifiers: PasswordFile, binding: bytes) -> Mechanism:
    """SCRAM-SHA-1 and SCRAM-SHA-256 (RFC 5802, RFC 7677), and -PLUS with tls-unique if there is a binding"""
    from scramp import ScramException, ScramMechanism

    users = []

    def verifier(user: str) -> tuple[bytes, bytes, bytes, int]:
        users.append(user)
        return verifiers.scram(user, name.removesuffix("-PLUS"))

    server = ScramMechanism(name).make_server(verifier, ("tls-unique", binding) if binding else None)
    try:
        response = yield b""
        first = response.decode("utf-8")
        server.set_client_first(first)
        wanted = first.split(",")[1].removeprefix("a=")  # some versions of scramp ignore the authzid
        authorized(users[0], wanted.replace("=2C", ",").replace("=3D", "="))
        response = yield server.get_server_first().encode()
        server.set_client_final(response.decode("utf-8"))
        yield server.get_server_final().encode()
    except ScramException as error:
        if isinstance(error.__cause__, Unavailable):  # verifier() raised it
            raise error.__cause__ from None
        user, plain_name = "".join(users), name.removesuffix("-PLUS")
        known = verifiers.has(user, plain_name)
        raise AuthenticationFailed(str(error) if known else f"no verifier for {plain_name}", user) from None
    return str(users[0])


def authorized(user: str, wanted: str) -> str:
    """The user. Raises AuthenticationFailed if the client wants to act as another one (authzid)."""
    if wanted not in ("", user):
        raise AuthenticationFailed(f"may not act for {wanted}", user)
    return user


def run_mechanism(mechanism: Mechanism, response: bytes | None, ask: Callable[[bytes], bytes]) -> str:
    """Runs a mechanism to its end; the user's name. Raises what the mechanism and ask() raise.

    response: the client's initial response; None without. ask: sends a challenge, and returns the client's response.
    """
    try:
        challenge = next(mechanism)
        while True:
            challenge = mechanism.send(ask(challenge) if response is None else response)
            response = None
    except StopIteration as done:
        return str(done.value)
    finally:
        mechanism.close()


class PasswordFile:
    """A file with lines "user:verifier", where a verifier is for argon2id or SCRAM.

    Argon2id: as the command argon2 -e prints it, "$argon2id$...". SCRAM: as Dovecot's doveadm pw prints it,
    "{SCRAM-SHA-256}iterations,salt,stored key,server key".
    Methods raise Unavailable when the file cannot be used. To a client, an unknown user is like one with another
    password: what it is told, and how long that takes, are the same.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def check(self, user: str, password: str) -> None:
        """Raises AuthenticationFailed unless that is the user's password."""
        verifiers = self._verifiers()
        verifier = verifiers.get(user) or next(iter(verifiers.values()), "")
        try:
            self._check_verifier(user, password, verifier)
        except (AuthenticationFailed, Unavailable):
            if user in verifiers:
                raise
        if user not in verifiers:
            raise AuthenticationFailed("unknown user", user)

    def scram(self, user: str, name: str) -> tuple[bytes, bytes, bytes, int]:
        """The salt, stored key, server key and iterations of a user for the SCRAM mechanism of that name.

        For a user without a verifier, those of a password that nobody has. The salt is always the same (RFC 5802
        section 9): it is made of the user's name, and of a key that nobody but the file has.
        Raises AuthenticationFailed if nobody has a verifier for that mechanism.
        """
        import hmac

        verifiers, prefix = self._verifiers(), f"{{{name}}}"
        if verifiers.get(user, "").startswith(prefix):
            return self._parsed_scram(user, verifiers[user])
        other = next((other for other in verifiers if verifiers[other].startswith(prefix)), "")
        if not other:
            raise AuthenticationFailed(f"no verifier for {name}", user)
        salt, stored_key, server_key, iterations = self._parsed_scram(other, verifiers[other])
        made_up = hmac.digest(stored_key, user.encode(), "sha512")
        return made_up[: len(salt)], os.urandom(len(stored_key)), os.urandom(len(server_key)), iterations

    def has(self, user: str, name: str) -> bool:
        """Whether the user has a verifier for the SCRAM mechanism of that name."""
        return self._verifiers().get(user, "").startswith(f"{{{name}}}")

    def scram_mechanisms(self) -> list[str]:
        """The SCRAM mechanisms for which the file has a verifier."""
        verifiers = self._verifiers().values()
        return [name for name in SCRAM_MECHANISMS if any(each.startswith(f"{{{name}}}") for each in verifiers)]

    def _check_verifier(self, user: str, password: str, verifier: str) -> None:
        if verifier.startswith("$argon2"):
            self._check_argon2(user, password, verifier)
            return
        from hmac import compare_digest

        from scramp import ScramException, ScramMechanism

        name = verifier[1:].partition("}")[0]
        if name not in SCRAM_MECHANISMS:
            raise self._malformed(user)
        salt, stored_key, _, iterations = self._parsed_scram(user, verifier)
        try:
            _, computed_key, _, _ = ScramMechanism(name).make_auth_info(password, iterations, salt)
        except ScramException as error:
            raise AuthenticationFailed(f"not a password: {error}", user) from None
        if not compare_digest(stored_key, computed_key):
            raise AuthenticationFailed("wrong password", user)

    def _parsed_scram(self, user: str, verifier: str) -> tuple[bytes, bytes, bytes, int]:
        """The salt, stored key, server key and iterations of a verifier for SCRAM."""
        from base64 import b64decode

        try:
            iterations, *keys = verifier.partition("}")[2].split(",")
            salt, stored_key, server_key = (b64decode(key, validate=True) for key in keys)
            if len(salt) < SALT_MINIMUM or int(iterations) < ITERATIONS_MINIMUM:
                raise self._malformed(user)
            return salt, stored_key, server_key, int(iterations)
        except ValueError:
            raise self._malformed(user) from None

    def _check_argon2(self, user: str, password: str, verifier: str) -> None:
        from argon2 import PasswordHasher
        from argon2.exceptions import InvalidHash, VerificationError, VerifyMismatchError

        try:
            PasswordHasher().verify(verifier, password)
        except VerifyMismatchError:
            raise AuthenticationFailed("wrong password", user) from None
        except (InvalidHash, VerificationError):
            raise self._malformed(user) from None

    def _malformed(self, user: str) -> Unavailable:
        return Unavailable(f"{self._path}: the verifier of {user} is malformed")

    def _verifiers(self) -> dict[str, str]:
        """The verifier of each user. A file that is open to others cannot be used."""
        verifiers: dict[str, str] = {}
        try:
            with open(self._path, encoding="utf-8") as file:
                if os.fstat(file.fileno()).st_mode & (stat.S_IROTH | stat.S_IWOTH):
                    raise Unavailable(f"{self._path}: open to everybody; chmod o-rw")
                for line in file:
                    user, _, verifier = line.strip().partition(":")
                    if verifier and not user.startswith("#"):
                        verifiers.setdefault(user, verifier)
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(with_path(self._path, error)) from None
        return verifiers


def check_with_saslauthd(path: str, service: str, user: str, password: str) -> None:
    """Raises AuthenticationFailed if saslauthd(8) refuses the password, and Unavailable.

    The protocol of saslauthd: request and answer are strings, each after its length.
    """
    fields = [field.encode() for field in (user, password, service, "")]
    if any(len(field) > 255 for field in fields):
        raise AuthenticationFailed("user or password is too long", user)
    with connect_to_service(path) as sock, sock.makefile("rb") as answers:
        try:
            sock.sendall(b"".join(len(field).to_bytes(2, "big") + field for field in fields))
            answer = answers.read(int.from_bytes(answers.read(2), "big"))
        except OSError as error:
            raise Unavailable(with_path(path, error)) from None
    if not answer:
        raise Unavailable(f"{path}: no answer")
    if not answer.startswith(b"OK"):
        raise AuthenticationFailed(f"saslauthd: {answer.decode('utf-8', 'replace')}", user)


class DovecotAuth:
    """Dovecot's authentication service, as a client of it: all its mechanisms are passed through.

    mechanisms: those that it offers. plaintext: those among them that send a password or token unencrypted.
    Source: Dovecot's documentation of its authentication protocol, version 1.
    """

    def __init__(self, path: str) -> None:
        """Raises Unavailable."""
        self._service = DovecotService(path)
        self._requests = 0
        self.mechanisms: list[str] = []
        self.plaintext: list[str] = []
        self._service.say("VERSION", "1", "1")
        self._service.say("CPID", str(os.getpid()))
        while (words := self._service.hear())[0] != "DONE":
            if words[0] == "MECH" and "private" not in words:
                self.mechanisms.append(words[1].upper())
                if "plaintext" in words:
                    self.plaintext.append(words[1].upper())

    def mechanism(self, name: str, service: str, address: str, secured: bool, has_initial: bool) -> Mechanism:
        """The mechanism of that name. Without an initial response, Dovecot sends the first challenge.

        name, service: of the mechanism and of this program. address: the client's; "" if it has none. secured: whether
        the connection has TLS. has_initial: whether the client has sent its first response already.
        """
        self._requests += 1
        identity = str(self._requests)
        response = [f"resp={to_base64((yield b''))}"] if has_initial else []
        parameters = [f"service={service}", "nologin"]
        parameters += [f"rip={address}"] if address else []
        parameters += ["secured"] if secured else []
        self._service.say("AUTH", identity, name, *parameters, *response)
        while True:
            verdict, *words = self._service.hear()
            if not words or words[0] != identity:
                continue
            if verdict == "CONT":
                try:
                    answer = yield from_base64("".join(words[1:2]).encode())
                except GeneratorExit:
                    self._cancel(identity)
                    raise
                self._service.say("CONT", identity, to_base64(answer))
            elif verdict == "OK":
                if not (user := user_in(words)):
                    raise Unavailable(f"{self._service.path}: a success without a user")
                return user
            elif not {"temp", "code=temp_fail"}.isdisjoint(words):
                raise Unavailable(f"{self._service.path}: temporary failure")
            else:
                raise AuthenticationFailed("dovecot: " + " ".join(words[1:]), user_in(words))

    def _cancel(self, identity: str) -> None:
        try:
            self._service.say("CANCEL", identity)
        except Unavailable:
            return  # the next attempt notices it

    def close(self) -> None:
        """Ends the connection."""
        self._service.close()


def user_in(fields: Sequence[str]) -> str:
    """The user in the fields of Dovecot's answer; "" if it names none."""
    return next((unescaped(field[5:]) for field in fields if field.startswith("user=")), "")


class Authenticator:
    """How one client may authenticate, and whether it may deliver.

    service: the name under which saslauthd and Dovecot know this program. trusted: whether the client may deliver
    without authentication. user: the authenticated user; "" if there is none. failures: how often the client failed.
    """

    def __init__(self, config: Config, service: str, peer: Peer, trusted: bool) -> None:
        self.trusted, self.user, self.failures = trusted, "", 0
        self._config, self._service, self._peer = config, service, peer
        self._dovecot: DovecotAuth | None = None

    @property
    def may_deliver(self) -> bool:
        """Whether the client is trusted, or has authenticated as one of the admins."""
        return self.trusted or self.user in self._config.admins

    def offer(self, tls: Tls | None) -> list[str]:
        """The mechanisms to offer on a connection with this encryption; none if they cannot be found out."""
        try:
            return self._mechanisms(tls)
        except Unavailable as error:
            log.error("authentication unavailable", cause=error)
            return []

    def check(self, name: str, tls: Tls | None) -> None:
        """Raises EncryptionRequired, UnknownMechanism or Unavailable, unless the client may use that mechanism."""
        if self._is_wanted(name) and self._is_too_weak(name, tls):
            raise EncryptionRequired
        try:
            if name not in self._mechanisms(tls):
                raise UnknownMechanism
        except Unavailable as error:
            self._give_up(name, error)
            raise

    def authenticate(self, name: str, tls: Tls | None, response: bytes | None, ask: Callable[[bytes], bytes]) -> None:
        """Sets the user, if the client proves an identity by the mechanism, which check() has allowed.

        response, ask: see run_mechanism(). The n-th failure takes n seconds. Raises AuthenticationFailed, Unavailable,
        ValueError for a malformed response, and what ask() raises.
        """
        try:
            self.user = run_mechanism(self._mechanism(name, tls, response is not None), response, ask)
        except (Unavailable, ImportError) as error:  # ImportError: see setup.py, extras_require
            self._give_up(name, error)
            raise Unavailable(str(error)) from None
        except AuthenticationFailed as error:
            self.failures += 1
            log.warning("authentication failed", mechanism=name, user=error.user, peer=self._peer.name, cause=error)
            time.sleep(self.failures)
            raise
        log.info("authenticated", user=self.user, mechanism=name, peer=self._peer.name)

    def close(self) -> None:
        """Ends what belongs to the connection."""
        if self._dovecot:
            self._dovecot.close()
            self._dovecot = None

    def _give_up(self, name: str, error: Exception) -> None:
        log.error("authentication unavailable", mechanism=name, cause=error)
        self.close()  # the next attempt may find the service back

    def _mechanisms(self, tls: Tls | None) -> list[str]:
        """The mechanisms that the client may use now. Raises Unavailable."""
        if self.trusted:
            return ["EXTERNAL"]
        return [name for name in self._available(tls) if self._is_wanted(name) and not self._is_too_weak(name, tls)]

    def _available(self, tls: Tls | None) -> list[str]:
        """The mechanisms that the configuration makes possible. Raises Unavailable."""
        names = ["EXTERNAL"] if tls and tls.identity else []
        if self._config.sasl_pwcheck_method == "dovecot":
            self._dovecot = self._dovecot or DovecotAuth(self._config.sasl_auth_socket_path)
            return names + [name for name in self._dovecot.mechanisms if name not in ("EXTERNAL", "ANONYMOUS")]
        if self._config.sasl_pwcheck_method == "auxprop":
            cause = "sasl_pwcheck_method: auxprop is for Cyrus alone; set lmtp_sasl_pwcheck_method"
            log.error("authentication unavailable", cause=cause)
            return names
        if self._config.sasl_pwcheck_method == "file":
            if not self._config.sasl_password_file:
                return names
            try:
                names_of_scram = PasswordFile(self._config.sasl_password_file).scram_mechanisms()
            except Unavailable:
                names_of_scram = list(SCRAM_MECHANISMS)  # AUTH is deferred then, and logged
            bound = [f"{name}-PLUS" for name in names_of_scram] if tls and tls.binding() else []
            names += [*bound, *names_of_scram]
        return [*names, *PLAINTEXT_MECHANISMS]

    def _is_wanted(self, name: str) -> bool:
        wanted = self._config.sasl_mech_list
        return not wanted or name in (wish.upper() for wish in wanted)

    def _is_too_weak(self, name: str, tls: Tls | None) -> bool:
        """Whether the mechanism needs stronger encryption than the connection has."""
        if self.trusted:
            return False
        shows_password = name in PLAINTEXT_MECHANISMS or (self._dovecot is not None and name in self._dovecot.plaintext)
        if not tls and shows_password and not self._config.allowplaintext:
            return True
        return (tls.bits if tls else 0) < self._config.sasl_minimum_layer

    def _mechanism(self, name: str, tls: Tls | None, has_initial: bool) -> Mechanism:
        """The mechanism of that name. has_initial: whether the client has sent its first response already."""
        if name == "EXTERNAL":
            return external(tls.identity if tls else TRUSTED_USER)
        if self._dovecot:
            return self._dovecot.mechanism(name, self._service, self._peer.address, tls is not None, has_initial)
        if name == "PLAIN":
            return plain(self._check_password)
        if name == "LOGIN":
            return login(self._check_password)
        return scram(name, PasswordFile(self._config.sasl_password_file), tls.binding() if tls else b"")

    def _check_password(self, user: str, password: str) -> None:
        if self._config.sasl_pwcheck_method == "file":
            PasswordFile(self._config.sasl_password_file).check(user, password)
        else:
            check_with_saslauthd(self._config.sasl_saslauthd_path, self._service, user, password)


def to_base64(data: bytes) -> str:
    """Data in the form that SASL sends. Source: RFC 4954 section 4."""
    from base64 import b64encode

    return b64encode(data).decode("ascii")


def from_base64(line: bytes) -> bytes:
    """Data from the form that SASL sends. Raises ValueError."""
    from base64 import b64decode

    return b64decode(line, validate=True)


# ======================================================================
# Session
#
# Owns the verbs and the state of the transaction.
# Must not know files.
# ======================================================================

TRACE_ID_LIMIT = 255  # characters
TRACE_ID = frozenset(LETTERS + DIGITS + "._-")
HEX_DIGITS = frozenset(DIGITS + "ABCDEF")
SIZE_DIGITS = 20  # RFC 1870 section 6
HOST_NAME = frozenset(LETTERS + DIGITS + ".-_:[]")
BODY_TYPES = ("7BIT", "8BITMIME")
VERBS_WHILE_SHUT = ("LHLO", "NOOP", "QUIT")
VERBS_BEFORE_TLS = ("LHLO", "NOOP", "STARTTLS", "QUIT")
RESPONSE_LIMIT = 12_290  # octets of a SASL response with its end, RFC 4954 section 4
MECHANISM_LIMIT = 20  # characters of a mechanism's name, RFC 4422 section 3.1
MECHANISM = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ-_" + DIGITS)
MAX_FAILURES = 3  # failed AUTHs; the last one ends the session
BAD_COMMAND_CODES = (500, 501, 555)  # reply codes that make a command count as bad
ADDRESS_VERBS = (b"MAIL", b"RCPT")
TRANSACTION_VERBS = (b"MAIL", b"RCPT", b"DATA", b"BDAT")  # do not count as idle when they succeed

OK = Reply(250, "2.0.0", "Ok")
BYE = Reply(221, "2.0.0", "Bye", closes=True)
SENDER_OK = Reply(250, "2.1.0", "Ok")
RECIPIENT_OK = Reply(250, "2.1.5", "Ok")
CANNOT_VERIFY = Reply(252, "2.3.3", "Try RCPT to attempt delivery")
GO_AHEAD = Reply(354, "", "Go ahead, end with a line of one dot")
BAD_SYNTAX = Reply(500, "5.5.2", "Syntax error or unknown command, see HELP")
# After a malformed BDAT, octets of the message could be taken for commands.
BAD_CHUNK = Reply(501, "5.5.4", "BDAT needs a size, then LAST or nothing; closing the connection", closes=True)
NO_TRANSACTION = Reply(503, "5.5.1", "Need MAIL command")
NO_RECIPIENTS = Reply(503, "5.5.1", "No recipients")
NESTED_MAIL = Reply(503, "5.5.1", "Nested MAIL command")
CHUNKING_BEGUN = Reply(503, "5.5.1", "Only BDAT or RSET may follow BDAT")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients, send the message to the others separately")
TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many bad commands, closing the connection")
NOT_ASCII = Reply(553, "5.6.7", "Non-ASCII addresses need the SMTPUTF8 parameter of MAIL")
TOO_MANY_COMMANDS = Reply(421, "4.7.0", "Too many commands without a message, closing the connection")
READY_FOR_TLS = Reply(220, "2.0.0", "Ready to start TLS")
AUTHENTICATED = Reply(235, "2.7.0", "Authentication successful")
AUTHENTICATION_DOWN = Reply(454, "4.7.0", "Authentication is not possible now, try again later")
RESPONSE_TOO_LONG = Reply(500, "5.5.6", "Authentication exchange line is too long")
MALFORMED_RESPONSE = Reply(501, "5.5.2", "Malformed response")
CANCELLED = Reply(501, "5.7.0", "Authentication cancelled")
NOT_NOW = Reply(503, "5.5.1", "Done already, or a transaction is open")
UNKNOWN_MECHANISM = Reply(504, "5.5.4", "Mechanism not available")
TLS_IMPOSSIBLE = Reply(421, "4.7.0", "TLS is required, but not possible now, try again later")
TLS_FIRST = Reply(530, "5.7.0", "Must issue a STARTTLS command first")
FAILED = Reply(535, "5.7.8", "Authentication failed")
FAILED_TOO_OFTEN = Reply(535, "5.7.8", "Authentication failed too often, closing the connection", closes=True)
ENCRYPTION_FIRST = Reply(538, "5.7.11", "Encryption is required for this mechanism")
NOT_ALLOWED = Reply(550, "5.7.1", "You are not allowed to deliver here")
AUTHENTICATE_LATER = Reply(430, "4.7.0", "Authentication required")
AUTHENTICATE_FIRST = Reply(530, "5.7.0", "Authentication required")


class Transaction(Envelope):
    """A mail transaction (RFC 5321 section 3.3): the envelope, and the message while it arrives.

    utf8: whether SMTPUTF8 was asked for. announced_size: octets; 0 if the client has not given the size. asked: the
    address of the RCPT in hand. has_refused: whether a recipient was refused.
    """

    def __init__(self, reverse_path: Address | None, utf8: bool, announced_size: int, eol: bytes) -> None:
        super().__init__(reverse_path)
        self.utf8, self.announced_size = utf8, announced_size
        self.asked: Address | None = None
        self.has_refused = False
        self.incoming: Incoming | None = None
        self._eol, self._chunks = eol, ChunkDecoder(eol)

    def receive_data(self, incoming: Incoming, connection: Connection) -> None:
        """Receives a whole message with DATA. Raises LmtpError when time is up, and Disconnected."""
        self.incoming = incoming
        decoder = DotDecoder(self._eol)
        while not decoder.ended:
            incoming.write(decoder.decode(connection.read_some()))
        connection.unread(decoder.rest)

    def receive_chunk(self, incoming: Incoming, chunk: Iterator[bytes], is_last: bool) -> None:
        """Receives a part of a message with BDAT. Raises what reading the chunk raises."""
        self.incoming = incoming
        for data in chunk:
            incoming.write(self._chunks.decode(data))
        if is_last:
            incoming.write(self._chunks.rest())

    def fields(self, recipient: str) -> dict[str, object]:
        """What the log says of it, with a recipient or several; size is the announced size in octets."""
        return {"sender": f"<{self.reverse_path or ''}>", "recipient": recipient, "size": self.announced_size}

    def discard(self) -> None:
        """Frees the message, if one has begun to arrive."""
        if self.incoming:
            self.incoming.discard()


class Dialogue:
    """Serves commands until the client leaves or sends too many useless ones, or the process has to end.

    A subclass interprets the commands. in_transaction: whether SIGTERM waits for the end of a transaction.
    """

    def __init__(self, connection: Connection, stop: Stop, config: Config) -> None:
        self._connection, self._stop, self._config = connection, stop, config
        self.in_transaction = False
        self._parting: Reply | None = None
        self._bad_commands = self._idle_commands = 0
        self._may_end = False
        connection.wire.on_wakeup = self._on_wakeup

    def interpret(self, line: bytes) -> None:
        """Does what a command line says, and replies. Raises LmtpError if the command is refused."""
        raise NotImplementedError

    def log_refusal(self, line: bytes, reply: Reply) -> None:
        """Logs that a command line was refused."""
        raise NotImplementedError

    def reply(self, reply: Reply) -> None:
        """Sends a reply."""
        if log.debugging:
            log.debug("reply", text=f"{reply} {reply.text}")
        self._connection.write(reply.render(self._connection.eol))
        if reply.closes:
            self._parting = reply

    def run(self, greeting: Reply) -> str:
        """Greets, and serves until a reply ends the session; that reply, or else why it ended. Never raises."""
        reason = ""
        try:
            self._serve_commands(greeting)
        except Disconnected as error:
            reason = str(error)
        self._connection.wire.on_wakeup = lambda: None  # leaves no cycle for the garbage collector
        return f"{self._parting} {self._parting.text}" if self._parting else reason

    def reset_counts(self) -> None:
        """Counts bad and idle commands anew, after a message."""
        self._bad_commands = self._idle_commands = 0

    def _serve_commands(self, greeting: Reply) -> None:
        """Serves until a reply ends the session. Raises Disconnected."""
        try:
            self._connection.detect_eol()
            self.reply(greeting)
            while not self._parting:
                self._serve_command()
        except Disconnected:
            raise
        except Exception:
            log.traceback("internal error")
            self.reply(INTERNAL_ERROR)
        if self._parting is BYE:
            self._connection.end()
        else:
            self._connection.linger()

    def _serve_command(self) -> None:
        """Serves one command. A refusal is logged, sent and counted; too many end the session. Raises Disconnected."""
        line = b""
        try:
            line = self._next_command()
            self.interpret(line)
            self._idle_commands += line[:4].upper() not in TRANSACTION_VERBS
        except LmtpError as error:
            if isinstance(error, LineTooLong):
                line = error.beginning
            if line or error.reply.code != 421:  # else the session ends because nothing was said
                self.log_refusal(line, error.reply)
            self.reply(error.reply)
            self._bad_commands += error.reply.code in BAD_COMMAND_CODES
            self._idle_commands += error.reply is not TOO_MANY_RECIPIENTS
        if self._parting:
            return
        if 0 < self._config.lmtp_max_bad_commands < self._bad_commands:
            self.reply(TOO_MANY_ERRORS)
        elif 0 < self._config.lmtp_max_idle_commands < self._idle_commands:
            self.reply(TOO_MANY_COMMANDS)

    def _next_command(self) -> bytes:
        self._may_end = not self.in_transaction
        try:
            self._check_stop()
            return self._connection.read_line()
        except LineTooLong as error:
            if error.beginning[:4].upper() == b"BDAT":
                raise LineTooLong(error.beginning, BAD_CHUNK) from None
            raise
        finally:
            self._may_end = False

    def _on_wakeup(self) -> None:
        self._stop.wakeup.drain()
        if self._stop.at_once:
            raise Disconnected("terminated")
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.requested and self._may_end:
            raise LmtpError(SHUTTING_DOWN)


class MailDialogue(Dialogue):
    """The part of a session that makes mail transactions (RFC 5321 section 3.3).

    id: the session's. authenticator: who the client is, and what it may do. agent: where messages go.

    Each method for a verb takes the rest of the command line, and replies or raises LmtpError. Unless the error ends
    the session, the transaction is unchanged.
    """

    def __init__(
        self,
        connection: Connection,
        peer: Peer,
        authenticator: Authenticator,
        agent: DeliveryAgent,
        stop: Stop,
        config: Config,
    ) -> None:
        super().__init__(connection, stop, config)
        self.id = f"lmtpd-{os.getpid()}-{time.time_ns() // 1000}"
        self._peer, self._authenticator, self._agent = peer, authenticator, agent
        self._delivered = Reply(250, "2.1.5", f"Ok SESSIONID=<{self.id}>")
        self._client = "unknown"
        self._transaction: Transaction | None = None
        self._last_refusal: Reply | None = None

    def loggable(self, line: bytes) -> str:
        """A command line for the log, without secrets."""
        raise NotImplementedError

    def log_refusal(self, line: bytes, reply: Reply) -> None:
        """See Dialogue.log_refusal(). What says nothing new is logged only with the option debug."""
        transaction, fields = self._transaction, {}
        if transaction and line[:4].upper() == b"RCPT":
            fields = transaction.fields(f"<{transaction.asked or ''}>")
            transaction.asked, transaction.has_refused = None, True
        is_repeated = reply is self._last_refusal is TOO_MANY_RECIPIENTS
        follows = reply is NO_RECIPIENTS and transaction and transaction.has_refused
        self._last_refusal = reply
        if log.debugging or not (is_repeated or follows):
            log.info("refused", command=self.loggable(line), **fields, reply=f"{reply} {reply.text}")

    def log_cut_off(self, reason: str) -> None:
        """Logs whose message it was, if the session ends before the transaction does."""
        transaction = self._transaction
        if not transaction or not transaction.destinations or self._parting is BYE:
            return
        recipients = ", ".join(f"<{each.recipient.address}>" for each in transaction.destinations)
        received = transaction.incoming.wire_size if transaction.incoming else 0
        log.warning("transaction cut off", **transaction.fields(recipients), received=received, reason=reason)

    def do_mail(self, argument: str) -> None:
        """RFC 5321 section 4.1.1.2"""
        if not self._authenticator.may_deliver:
            if self._authenticator.user:
                raise LmtpError(NOT_ALLOWED)
            raise LmtpError(AUTHENTICATE_LATER if self._config.soft_noauth else AUTHENTICATE_FIRST)
        if self._transaction:
            raise LmtpError(NESTED_MAIL)
        address, parameters = parse_argument(argument, "FROM:")
        utf8, announced_size = parse_mail_parameters(parameters, self._config)
        check_characters(address, utf8, self._config)
        self._transaction = Transaction(address, utf8, announced_size, self._connection.eol)
        self.in_transaction = True
        self.reply(SENDER_OK)

    def do_rcpt(self, argument: str) -> None:
        """RFC 5321 section 4.1.1.3"""
        transaction = self._transaction
        if not transaction:
            raise LmtpError(NO_TRANSACTION)
        if transaction.incoming:
            raise LmtpError(CHUNKING_BEGUN)
        transaction.destinations.append(self._destination(argument, transaction))
        transaction.asked = None  # a later RCPT may be refused before its address is known
        self.reply(RECIPIENT_OK)

    def _destination(self, argument: str, transaction: Transaction) -> Destination:
        """The destination for the recipient that the argument of RCPT names. Raises LmtpError."""
        transaction.asked, parameters = parse_argument(argument, "TO:")
        for keyword, value in parameters.items():
            if keyword != "IGNOREQUOTA" or value is not None:
                raise unsupported(keyword)
        address = transaction.asked
        check_characters(address, transaction.utf8, self._config)
        if len(transaction.destinations) >= self._config.lmtp_max_recipients:
            raise LmtpError(TOO_MANY_RECIPIENTS)
        if address is None:
            raise LmtpError(USER_UNKNOWN)
        ignores_quota = "IGNOREQUOTA" in parameters
        return self._agent.router.find(address, transaction, transaction.announced_size, ignores_quota)

    def do_data(self, argument: str) -> None:
        """RFC 5321 section 4.1.1.4, RFC 2033 section 4.2"""
        if argument:
            raise malformed("DATA takes no parameters")
        transaction = self._transaction
        if not transaction or not transaction.destinations:
            raise LmtpError(NO_RECIPIENTS)
        if transaction.incoming:
            raise LmtpError(CHUNKING_BEGUN)
        self.reply(GO_AHEAD)
        incoming = self._new_incoming(transaction)
        transaction.receive_data(incoming, self._connection)
        self._deliver(transaction, incoming)

    def do_bdat(self, argument: str) -> None:
        """RFC 3030 section 2; in LMTP, each recipient gets a reply to the last chunk"""
        size, is_last = parse_chunk_size(argument)
        transaction = self._transaction
        if not transaction or not transaction.destinations:
            self._skip_chunk(size)
            raise LmtpError(NO_RECIPIENTS)
        incoming = transaction.incoming or self._new_incoming(transaction)
        transaction.receive_chunk(incoming, self._connection.pieces(size), is_last)
        if is_last:
            self._deliver(transaction, incoming)
        else:
            self.reply(self._agent.refusal(incoming) or Reply(250, "2.0.0", f"{size} octets received"))

    def do_rset(self, argument: str) -> None:
        """RFC 5321 section 4.1.1.5"""
        if argument:
            raise malformed("RSET takes no parameters")
        self._reset()
        self.reply(Reply(250, "2.0.0", f"Ok SESSIONID=<{self.id}>"))

    def _new_incoming(self, transaction: Transaction) -> Incoming:
        origin = Origin(
            client=self._client,
            peer=self._peer.name,
            session=self.id,
            trusted=self._authenticator.trusted,
            user=self._authenticator.user,
            tls=self._connection.tls,
            utf8=transaction.utf8,
        )
        destinations = transaction.destinations
        recipient = destinations[0].recipient.address if len(destinations) == 1 else None
        trace = trace_header(origin, transaction.reverse_path, recipient, self._config)
        return Incoming(trace, self._config, self._agent.drafts(transaction))

    def _skip_chunk(self, size: int) -> None:
        for _ in self._connection.pieces(size):
            pass

    def _deliver(self, transaction: Transaction, incoming: Incoming) -> None:
        incoming.complete()
        replies = self._agent.deliver(incoming, transaction, self._delivered)
        self.reset_counts()
        self._reset()
        for reply in replies:
            self.reply(reply)

    def _reset(self) -> None:
        if self._transaction:
            self._transaction.discard()
        self._transaction, self._last_refusal, self.in_transaction = None, None, False


class Session(MailDialogue):
    """An LMTP session on a connection (RFC 2033)."""

    _auth_refused = False

    def serve(self) -> None:
        """Serves until the client leaves, or has to. Never raises."""
        product = {"on": f" {PRODUCT}", "min": " LMTP", "off": ""}[self._config.serverinfo]
        with log.context(session=self.id):
            log.info("connected", peer=self._peer.name)
            greeting = Reply(220, "", f"{self._config.servername}{product} ready")
            if self._config.tls_required and not self._is_protected() and not self._connection.tls_context:
                greeting = TLS_IMPOSSIBLE
            reason = self.run(greeting)
            self.log_cut_off(reason)
            self._reset()
            log.info("disconnected", reason=reason)

    def loggable(self, line: bytes) -> str:
        """See MailDialogue.loggable(). After a refused AUTH, a line that is no command may be a password."""
        verb = line.partition(b" ")[0].decode("utf-8", "replace").upper()
        return "..." if self._auth_refused and verb not in self.VERBS else without_secrets(line)

    def log_refusal(self, line: bytes, reply: Reply) -> None:
        """See Dialogue.log_refusal()."""
        super().log_refusal(line, reply)
        self._auth_refused |= line.lstrip()[:4].upper() == b"AUTH"

    def interpret(self, line: bytes) -> None:
        """See Dialogue.interpret()."""
        unreadable = BAD_CHUNK if line[:4].upper() == b"BDAT" else BAD_SYNTAX
        if not self._config.lmtp_strict_rfc2821 and line[:4].upper() in ADDRESS_VERBS:
            line = utf8_address(line)
        try:
            command = line.decode("utf-8").rstrip(WHITE_SPACE)  # RFC 5321 section 4.1.1 has it tolerated
        except UnicodeDecodeError:
            raise LmtpError(unreadable) from None
        if self._config.chatty:
            log.info("command", line=self.loggable(line))
        verb, _, argument = command.partition(" ")
        if (notice := self._stop.shutdown_file.notice()) and verb.upper() not in VERBS_WHILE_SHUT:
            raise LmtpError(Reply(421, "4.3.2", notice))
        method = self.VERBS.get(verb.upper())
        if not method or not verb.isascii() or not is_printable(command):
            raise LmtpError(unreadable)
        if self._config.tls_required and not self._is_protected() and verb.upper() not in VERBS_BEFORE_TLS:
            if verb.upper() == "BDAT":
                self._skip_chunk(parse_chunk_size(argument)[0])
            raise LmtpError(TLS_FIRST)
        method(self, argument)

    def _is_protected(self) -> bool:
        return self._authenticator.trusted or self._connection.tls is not None

    def do_lhlo(self, argument: str) -> None:
        """RFC 2033 section 4.1"""
        if not argument:
            raise malformed("LHLO needs the client's name")
        self._reset()
        self._client = "".join(c if c in HOST_NAME else "?" for c in argument)[:NAME_LIMIT]
        size = f" {self._config.maxmessagesize}" if self._config.maxmessagesize else ""
        mechanisms = self._authenticator.offer(self._connection.tls)
        extensions = [
            self._config.servername,
            "8BITMIME",
            "ENHANCEDSTATUSCODES",
            "PIPELINING",
            f"SIZE{size}",
            "SMTPUTF8",
            "CHUNKING",
            f"LIMITS RCPTMAX={self._config.lmtp_max_recipients}",
            "IGNOREQUOTA",
            "TRACE",
            *(["STARTTLS"] if self._connection.tls_context and not self._is_protected() else []),
            *([f"AUTH {' '.join(mechanisms)}"] if mechanisms else []),
            f"Ok SESSIONID=<{self.id}>",
        ]
        self.reply(Reply(250, "", "\n".join(extensions)))

    def do_starttls(self, argument: str) -> None:
        """RFC 3207"""
        context = self._connection.tls_context
        if not context or self._authenticator.trusted:
            raise LmtpError(BAD_SYNTAX)
        if argument:
            raise malformed("STARTTLS takes no parameters")
        if self._connection.tls or self._transaction:
            raise LmtpError(NOT_NOW)
        self.reply(READY_FOR_TLS)
        self._connection.start_tls(context)
        self._client, self._authenticator.user = "unknown", ""

    def do_auth(self, argument: str) -> None:
        """RFC 4954 section 4"""
        name, _, initial = argument.partition(" ")
        name = name.upper()
        if not name:
            raise malformed("AUTH needs a mechanism")
        if self._authenticator.user or self._transaction:
            raise LmtpError(NOT_NOW)
        tls = self._connection.tls
        try:
            self._authenticator.check(name, tls)
            response = decode_response(initial.encode()) if initial else None
            self._authenticator.authenticate(name, tls, response, self._ask)
        except EncryptionRequired:
            raise LmtpError(ENCRYPTION_FIRST) from None
        except UnknownMechanism:
            raise LmtpError(UNKNOWN_MECHANISM) from None
        except Unavailable:
            raise LmtpError(AUTHENTICATION_DOWN) from None
        except AuthenticationFailed:
            is_last = self._authenticator.failures >= MAX_FAILURES
            raise LmtpError(FAILED_TOO_OFTEN if is_last else FAILED) from None
        except ValueError:
            raise LmtpError(MALFORMED_RESPONSE) from None
        if self._authenticator.may_deliver:
            self._connection.wire.set_limit(self._config.lmtp_session_timeout)
        self.reply(AUTHENTICATED)

    def _ask(self, challenge: bytes) -> bytes:
        """The client's response to a challenge. Raises LmtpError, ValueError and Disconnected."""
        self.reply(Reply(334, "", to_base64(challenge)))
        try:
            return decode_response(self._connection.read_line(RESPONSE_LIMIT))
        except LineTooLong:
            raise LmtpError(RESPONSE_TOO_LONG) from None

    def do_noop(self, _argument: str) -> None:
        """RFC 5321 section 4.1.1.9"""
        self.reply(OK)

    def do_vrfy(self, argument: str) -> None:
        """RFC 5321 section 4.1.1.6"""
        if not argument:
            raise malformed("VRFY needs a user")
        self.reply(CANNOT_VERIFY)

    def do_help(self, _argument: str) -> None:
        """RFC 5321 section 4.1.1.8"""
        self.reply(Reply(214, "2.0.0", f"Commands: {' '.join(self.VERBS)}\nSee lmtpd(8)"))

    def do_trace(self, argument: str) -> None:
        """Cyrus lmtpd: an id by which the client marks the log from here on"""
        if not TRACE_ID.issuperset(argument) or not 0 < len(argument) <= TRACE_ID_LIMIT:
            raise malformed(
                f"TRACE needs an id of 1 to {TRACE_ID_LIMIT} letters, digits, dots, hyphens and underscores"
            )
        log.info("trace", traceid=argument)
        self.reply(Reply(250, "2.0.0", f"Ok SESSIONID=<{self.id}> TRACEID=<{argument}>"))

    def do_quit(self, argument: str) -> None:
        """RFC 5321 section 4.1.1.10"""
        if argument:
            raise malformed("QUIT takes no parameters")
        self.reply(BYE)

    VERBS: dict[str, Callable[[Any, str], None]] = {
        "LHLO": do_lhlo,
        "STARTTLS": do_starttls,
        "AUTH": do_auth,
        "MAIL": MailDialogue.do_mail,
        "RCPT": MailDialogue.do_rcpt,
        "DATA": MailDialogue.do_data,
        "BDAT": MailDialogue.do_bdat,
        "RSET": MailDialogue.do_rset,
        "NOOP": do_noop,
        "VRFY": do_vrfy,
        "HELP": do_help,
        "TRACE": do_trace,
        "QUIT": do_quit,
    }


def without_secrets(line: bytes) -> str:
    """A command for the log. After AUTH, however it is written, any word may be a password."""
    text = line.decode("utf-8", "replace")
    if not text.lstrip().upper().startswith("AUTH"):
        return text
    verb, _, argument = text.partition(" ")
    name = argument.partition(" ")[0]
    is_name = verb.upper() == "AUTH" and len(name) <= MECHANISM_LIMIT and MECHANISM.issuperset(name)
    return f"AUTH {name}" if is_name else "AUTH ..."


def utf8_address(line: bytes) -> bytes:
    """A command line in which each 8-bit octet before the domain is X, unless all of it is UTF-8."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        local, at, domain = line.partition(b"@")
        return local.translate(EIGHT_BIT_TO_X) + at + domain
    return line


def malformed(text: str) -> LmtpError:
    """The error for parameters that are malformed."""
    return LmtpError(Reply(501, "5.5.4", f"Syntax error in parameters: {text}"))


def unsupported(keyword: str) -> LmtpError:
    """The error for a parameter that is not supported (RFC 5321 section 4.1.1.11)."""
    return LmtpError(Reply(555, "5.5.4", f"Parameter {keyword} not supported here"))


def parse_argument(argument: str, prefix: str) -> tuple[Address | None, dict[str, str | None]]:
    """The address and the parameters of MAIL or RCPT. Raises LmtpError."""
    if argument[: len(prefix)].upper() != prefix:
        raise malformed(f"{prefix}<address> expected")
    try:
        address, rest = parse_path(argument[len(prefix) :])
        return address, parse_parameters(rest)
    except ValueError as error:
        raise malformed(str(error)) from None


def parse_mail_parameters(parameters: dict[str, str | None], config: Config) -> tuple[bool, int]:
    """Whether SMTPUTF8 is asked for, and the announced size in octets, 0 without. Raises LmtpError.

    Source: RFC 6531 section 3.4, RFC 1870 section 6, RFC 6152 section 3, RFC 4954 section 5.
    """
    utf8, size = False, 0
    for keyword, value in parameters.items():
        if keyword == "SMTPUTF8" and value is None:
            utf8 = True
        elif keyword == "SIZE":
            size = parse_size(value, config.maxmessagesize)
        elif keyword == "BODY":
            if (value or "").upper() not in BODY_TYPES:
                raise malformed(f"BODY must be one of {', '.join(BODY_TYPES)}")
        elif keyword == "AUTH":
            log.info("submitter", auth=decode_xtext(value))
        else:
            raise unsupported(keyword)
    return utf8, size


def parse_size(value: str | None, limit: int) -> int:
    """The octets that MAIL's SIZE parameter announces. limit: the most allowed; 0 for no limit. Raises LmtpError."""
    if not value or not DECIMAL.issuperset(value):
        raise malformed("SIZE must be a number")
    size = int(value[:SIZE_DIGITS])
    if 0 < limit < size:
        raise LmtpError(Reply(552, "5.2.3", f"Messages may have at most {limit} octets"))
    return size


def check_characters(address: Address | None, utf8: bool, config: Config) -> None:
    """Raises LmtpError for a non-ASCII address without SMTPUTF8, unless lmtp_strict_rfc2821 is off."""
    if config.lmtp_strict_rfc2821 and not utf8 and address and not (address.local + address.domain).isascii():
        raise LmtpError(NOT_ASCII)


def decode_xtext(value: str | None) -> str:
    """The value of MAIL's AUTH parameter (RFC 4954 section 5, RFC 3461 section 4). Raises LmtpError."""
    first, *rest = (value or "+").split("+")
    decoded = [first]
    for part in rest:
        if len(part) < 2 or not HEX_DIGITS.issuperset(part[:2]):
            raise malformed("AUTH must be xtext")
        decoded += chr(int(part[:2], 16)), part[2:]
    return "".join(decoded)


def decode_response(response: bytes) -> bytes:
    """The octets of a SASL response (RFC 4954 section 4). Raises ValueError, and LmtpError for one that cancels."""
    if response == b"*":
        raise LmtpError(CANCELLED)
    return b"" if response == b"=" else from_base64(response)


def parse_chunk_size(argument: str) -> tuple[int, bool]:
    """The size of a BDAT chunk in octets, and whether it is the last. Raises LmtpError, which ends the session."""
    size, _, keyword = argument.partition(" ")
    if not 0 < len(size) <= SIZE_DIGITS or not DECIMAL.issuperset(size) or keyword.upper() not in ("", "LAST"):
        raise LmtpError(BAD_CHUNK)
    return int(size), bool(keyword)


# ======================================================================
# Service
#
# Owns where connections come from, and how many a process serves.
# Must not know LMTP.
# ======================================================================

COUNT_LIMIT = 1_000_000  # for -U and -T; a worker waits up to 2 * -T, and epoll_wait(2) up to 2**31 ms
RELOAD_PATIENCE = 5  # seconds after SIGHUP until workers get SIGTERM; no new connection is served meanwhile
MASTER_STATUS_FD, MASTER_LISTEN_FD = 3, 4  # Cyrus master(8)
AVAILABLE, UNAVAILABLE, CONNECTED = 1, 2, 3  # messages of a worker to master(8), or to our own parent
EPOLLEXCLUSIVE = 1 << 28  # epoll_ctl(2): a connection wakes one worker, not all
PR_SET_DUMPABLE, PR_SET_PTRACER, PR_SET_PTRACER_ANY = 4, 0x59616D61, -1  # prctl(2)


class UsageError(Exception):
    """The command line has an error, which the text names."""


class Arguments:
    """The command line.

    config_file: -C. uses: -U, the connections that a process serves. timeout: -T, the seconds that it waits for another
    connection; 0 for ever. debugs: -D. expects_proxy: -H. trusts_internet: -a.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        """options: as docopt returns them. Raises UsageError."""
        self.config_file: str = options["-C"]
        self.uses = parse_count(options["-U"], "-U")
        self.timeout: float = parse_count(options["-T"], "-T")
        self.debugs, self.expects_proxy, self.trusts_internet = options["-D"], options["-H"], options["-a"]


def parse_count(value: str, name: str) -> int:
    """The number that is the argument of an option, from 0 to COUNT_LIMIT. Raises UsageError."""
    try:
        return min(max(int(value), 0), COUNT_LIMIT)
    except ValueError:
        raise UsageError(f"{name} needs a number, not {value!r}") from None


class Snapshot:
    """The state of files on the disk, to detect a change of one of them."""

    def __init__(self, files: Iterable[str]) -> None:
        self._files = tuple(files)
        self._states = self._present_states()

    def is_outdated(self) -> bool:
        """Whether one of the files has changed since the snapshot."""
        return self._present_states() != self._states

    def _present_states(self) -> list[tuple[int, int, int] | None]:
        states: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                status = os.stat(file)
                # The time of the last change of owner or permissions, too: the file may be readable now.
                states.append((status.st_ctime_ns, status.st_size, status.st_ino))
            except OSError:
                states.append(None)
        return states


class ConnectionHandler:
    """Serves one connection after the other on standard input and output.

    arguments: the command line. service: the name under which the process was started.
    snapshot: the files that it has read. tls_context: the settings for STARTTLS; None if there is no TLS. tls_files:
    where they come from.
    """

    def __init__(
        self,
        config: Config,
        arguments: Arguments,
        service: str,
        tls_context: SSLContext | None,
        tls_files: Sequence[str],
        stop: Stop,
    ) -> None:
        """Raises ConfigError."""
        self.config, self.arguments, self.service, self.stop = config, arguments, service, stop
        self.snapshot = Snapshot((__file__, *config.files, *tls_files))
        self._tls_context = tls_context
        self._agent = DeliveryAgent(config)

    def prepare(self) -> None:
        """Gets ready for many connections, before workers fork."""
        self._agent.prepare()

    def serve(self, peer: Peer) -> None:
        """Serves the connection that standard input and output are: a socket, pipe, file or terminal."""
        config, arguments = self.config, self.arguments
        wire = Wire(0, 1, config.lmtp_command_timeout, config.lmtp_session_timeout, self.stop.wakeup.fd)
        connection = Connection(wire, config.lmtp_command_timeout, self._tls_context)
        if peer.internet and config.tcp_keepalive:
            keep_alive(0, config)
        if arguments.expects_proxy:
            wire.set_limit(config.lmtp_auth_timeout)
            wire.on_wakeup = self._disconnect_if_stopped
            try:
                peer = read_proxy_header(connection, peer)
            except (Disconnected, LmtpError) as error:
                log.warning("connection refused", peer=peer.name, cause=error)
                return
        trusted = arguments.trusts_internet or not peer.internet
        limits = [config.lmtp_session_timeout, 0 if trusted else config.lmtp_auth_timeout]
        wire.set_limit(min(filter(None, limits), default=0))
        authenticator = Authenticator(config, self.service, peer, trusted)
        Session(connection, peer, authenticator, self._agent, self.stop, config).serve()
        authenticator.close()

    def trusts(self, listener: Socket) -> bool:
        """Whether the clients of a listening socket are trusted, all of them."""
        may_be_remote = listener.family != socket.AF_UNIX or self.arguments.expects_proxy
        return self.arguments.trusts_internet or not may_be_remote

    def debug(self) -> None:
        """With -D, runs debug_command on this process and waits for its end. See run_debugger()."""
        if self.arguments.debugs:
            command = debug_command(self.config.debug_command, sys.executable, os.getpid(), self.service) or ""
            run_debugger(command, self.stop)

    def _disconnect_if_stopped(self) -> None:
        self.stop.wakeup.drain()
        if self.stop.requested:
            raise Disconnected("terminated")


def run_debugger(command: str, stop: Stop) -> None:
    """Runs a shell command that may trace this process, and waits for its end or for a signal."""
    import ctypes
    import subprocess

    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_DUMPABLE, 1)  # a process that has changed its user cannot be traced otherwise
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)
    null = subprocess.DEVNULL
    try:
        with stop.interruptible():
            result = subprocess.run(command, shell=True, check=False, stdin=null, stdout=null, stderr=null)
        log.info("debugger", command=command, status=result.returncode)
    except Interrupted:
        log.info("debugger", command=command, status="interrupted")


def keep_alive(fd: int, config: Config) -> None:
    """Lets the system probe a silent connection, see tcp(7)."""
    with Socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            (socket.TCP_KEEPCNT, config.tcp_keepalive_cnt),
            (socket.TCP_KEEPIDLE, config.tcp_keepalive_idle),
            (socket.TCP_KEEPINTVL, config.tcp_keepalive_intvl),
        ):
            if value:
                sock.setsockopt(socket.IPPROTO_TCP, name, value)


def use_as_standard_io(fd: int) -> None:
    """Makes a descriptor standard input and output."""
    os.dup2(fd, 0)
    os.dup2(fd, 1)


class Worker:
    """Takes connections from listening sockets, one at a time, until it is time to leave.

    reporter: told when the state changes. timeout: seconds to wait for a connection, 0 for ever. preforked: whether the
    worker waits for ever for its first connection. lock: the descriptor of a file whose holder alone waits for a
    connection, as master(8) wants it; -1 where the kernel wakes only one worker.
    """

    def __init__(
        self,
        handler: ConnectionHandler,
        listeners: Sequence[Socket],
        reporter: Reporter,
        timeout: float,
        preforked: bool,
        lock: int = -1,
    ) -> None:
        self._handler, self._listeners, self._lock = handler, listeners, lock
        self._stop, self._timeout, self._preforked = handler.stop, timeout, preforked
        self._report, self._parent = reporter.report, reporter.fd
        self._served = 0
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._arrivals = select.epoll()
        self._arrivals.register(self._stop.wakeup.fd, select.EPOLLIN)
        self._arrivals.register(self._parent, 0)  # 0: only that the parent has closed its end
        # The holder of a lock waits alone, and has to hear of a connection that another worker did not take.
        exclusive = EPOLLEXCLUSIVE if lock < 0 else 0
        for listener in listeners:
            self._arrivals.register(listener, select.EPOLLIN | exclusive)

    def run(self) -> None:
        """Serves until it is time to leave.

        That is after -U connections, -T seconds without any, when the parent dies, a file changes or a signal comes.
        """
        self._handler.debug()
        while connection := self._next():
            if self._lock >= 0:  # only master(8) needs this report
                self._report(UNAVAILABLE)
            with connection:
                peer = Peer.of_socket(connection)
                use_as_standard_io(connection.fileno())
            self._report(CONNECTED)
            self._handler.serve(peer)
            use_as_standard_io(self._null)
            self._served += 1
            if self._served >= self._handler.arguments.uses or self._stop.leaving:
                return
            self._report(AVAILABLE)
        self._report(UNAVAILABLE)

    def _next(self) -> Socket | None:
        """The next connection; None when it is time to leave."""
        is_first = self._preforked and not self._served
        deadline = FOREVER if is_first or not self._timeout else time.monotonic() + self._timeout
        if self._lock < 0:
            return self._accept(deadline)
        import fcntl

        try:
            with self._stop.interruptible(deadline):
                if not self._stop.leaving:
                    fcntl.lockf(self._lock, fcntl.LOCK_EX)
            return self._accept(deadline)
        except Interrupted:
            return None
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def _accept(self, deadline: float) -> Socket | None:
        """The next connection; None at the deadline, at a signal, if the parent has died, or if a file has changed."""
        stop = self._stop
        while not stop.leaving:
            patience = None if deadline == FOREVER else max(deadline - time.monotonic(), 0)
            ready = [fd for fd, _ in self._arrivals.poll(patience)]
            if stop.wakeup.fd in ready:
                stop.wakeup.drain()
            if not ready or self._parent in ready or self._handler.snapshot.is_outdated():
                return None
            turn = (os.getpid() + self._served) % len(self._listeners)  # no busy listener starves the others
            for listener in (*self._listeners[turn:], *self._listeners[:turn]):
                if listener.fileno() in ready and (connection := accept(listener)):
                    return connection
        return None


def accept(listener: Socket) -> Socket | None:
    """A connection; None if another process took it, the client has gone, or accept(2) fails: then after a second."""
    try:
        connection = listener._accept()[0]  # type: ignore[attr-defined]
        return Socket(listener.family, listener.type, listener.proto, connection)
    except (BlockingIOError, ConnectionError):
        return None
    except OSError as error:
        log.error("accept failed", cause=error)
        time.sleep(1)  # no descriptors or no memory: no reason to leave, or to spin
        return None


class WorkerGroup:
    """The workers for some of a pool's sockets. limit: how many there may be.

    workers: the process id of each, and its last message; 0 before the first. idle_one_left: whether an idle worker has
    left: the kernel may have woken only that one for a new connection.
    """

    def __init__(self, listeners: Sequence[Socket], limit: int) -> None:
        self.listeners, self.limit = listeners, limit
        self.workers: dict[int, int] = {}
        self.idle_one_left = False

    @classmethod
    def divide(cls, listeners: Sequence[Socket], handler: ConnectionHandler) -> list[WorkerGroup]:
        """The groups for these sockets: one for clients that are trusted, one for the others.

        So there is always a worker for the former, however many of the latter hold a connection.
        """
        config = handler.config
        limits = {True: config.lmtp_maxchild, False: config.lmtp_maxchild_untrusted or config.lmtp_maxchild}
        divided = {trust: [each for each in listeners if handler.trusts(each) is trust] for trust in limits}
        return [cls(divided[trust], limit) for trust, limit in limits.items() if divided[trust]]

    def ready(self) -> int:
        """How many workers wait for a connection."""
        return sum(message in (0, AVAILABLE) for message in self.workers.values())

    def is_full(self) -> bool:
        """Whether no worker may be added."""
        return len(self.workers) >= self.limit

    def needs_worker(self) -> bool:
        """Whether a connection that waits needs another worker, and may have one."""
        return (self.idle_one_left or not self.ready()) and not self.is_full()


class Pool:
    """The parent of workers on the listening sockets of systemd or inetd. They report to it as to master(8).

    It forks a worker when a connection waits and no worker is ready, and accepts nothing itself. It ends on a
    signal, when a file has changed before a fork, or after -T idle seconds.
    """

    def __init__(self, handler: ConnectionHandler, listeners: Sequence[Socket]) -> None:
        self._handler, self._groups = handler, WorkerGroup.divide(listeners, handler)
        self._stop, self._timeout = handler.stop, handler.arguments.timeout
        self._notifier = Notifier()
        self._served = 0
        self._busy_at = time.monotonic()
        self._not_before = 0.0  # back-off: no fork until then
        self._child_left = self._outdated = False
        self._reports, self._reported = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for listener in listeners:
            listener.setblocking(False)

    def run(self) -> None:
        """Serves until it is time to leave, and no worker is left."""
        signal.signal(signal.SIGCHLD, self._on_child)
        self._handler.prepare()
        self._notifier.send("READY=1")
        while not self._is_over():
            self._prefork()
            happened = self._wait(self._tell_status())
            for group in self._groups:
                if any(listener.fileno() in happened for listener in group.listeners):
                    self._start_worker(group, preforked=False)
            if self._reports in happened:
                self._read_reports()
            self._reap()
        self._finish()

    def _on_child(self, *_: object) -> None:
        self._child_left = True

    def _is_over(self) -> bool:
        if self._stop.leaving:
            return True
        if self._outdated:
            log.info("program, configuration or certificates changed, leaving")
            return True
        idle = time.monotonic() - self._busy_at
        return not self._workers() and 0 < self._timeout <= idle

    def _workers(self) -> list[int]:
        return [process for group in self._groups for process in group.workers]

    def _prefork(self) -> None:
        for group in self._groups:
            wanted = min(self._handler.config.lmtp_prefork, group.limit)
            while group.ready() < wanted and not group.is_full() and self._may_fork() and not self._outdated:
                self._start_worker(group, preforked=True)

    def _may_fork(self) -> bool:
        return time.monotonic() >= self._not_before

    def _wait(self, patience: float) -> set[int]:
        """Waits so many seconds for something to happen; the descriptors that have become readable.

        Listening sockets are among them only if a connection that waits there needs a worker.
        """
        poll = select.poll()
        for fd in (self._stop.wakeup.fd, self._reports):
            poll.register(fd, select.POLLIN)
        for group in self._groups:
            if self._may_fork() and group.needs_worker():
                group.idle_one_left = False
                for listener in group.listeners:
                    poll.register(listener, select.POLLIN)
        happened = {fd for fd, _ in poll.poll(self._patience(patience) * 1000)}
        if self._stop.wakeup.fd in happened:
            self._stop.wakeup.drain()
        return happened

    def _patience(self, longest: float) -> float:
        """Seconds until the next timed action."""
        now = time.monotonic()
        waits = [longest]
        if not self._workers() and self._timeout:
            waits.append(self._busy_at + self._timeout - now)
        if self._not_before > now:
            waits.append(self._not_before - now)
        return max(min(waits), 0.001)

    def _start_worker(self, group: WorkerGroup, preforked: bool) -> None:
        """Forks a worker, or sets _outdated if a file has changed. A failed fork starts a back-off of a second."""
        self._outdated = self._handler.snapshot.is_outdated()
        if self._outdated:
            return
        self._busy_at = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the worker handles them
        try:
            process = os.fork()
            if not process:
                self._become_worker(group, preforked)
            group.workers[process] = 0
        except OSError as error:
            log.error("worker not started", cause=error)
            self._not_before = time.monotonic() + 1
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _become_worker(self, group: WorkerGroup, preforked: bool) -> NoReturn:
        status = os.EX_SOFTWARE
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent passes it on
            self._stop.unblock()
            os.close(self._reports)
            os.set_blocking(self._reported, True)
            reporter = Reporter(self._reported, self._stop)
            Worker(self._handler, group.listeners, reporter, self._timeout, preforked).run()
            status = os.EX_OK
        except Exception:
            log.traceback("internal error")
        finally:
            os._exit(status)

    def _read_reports(self) -> None:
        for message, process in Reporter.parse(os.read(self._reports, READ_SIZE)):
            self._served += message == CONNECTED
            self._busy_at = self._busy_at if message == UNAVAILABLE else time.monotonic()
            for group in self._groups:
                if process in group.workers:
                    group.workers[process] = message

    def _reap(self) -> None:
        """Forgets workers that have ended. If one died before its first report, starts a back-off of a second."""
        if not self._child_left:
            return
        self._child_left = False
        while self._workers():
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            group = next((group for group in self._groups if process in group.workers), self._groups[0])
            message = group.workers.pop(process, 0)
            if message == CONNECTED:  # it left at the end of a connection
                self._busy_at = time.monotonic()
            else:
                group.idle_one_left = True
            if status:
                log.error("worker died", worker=process, status=os.waitstatus_to_exitcode(status))
                if not message:  # it died before its first connection, and the next one will, too
                    self._not_before = time.monotonic() + 1

    def _tell_status(self) -> float:
        """Tells systemd the number of workers; the seconds after which to tell it again."""
        ready = sum(group.ready() for group in self._groups)
        busy = len(self._workers()) - ready
        return self._notifier.status(f"{ready} workers ready, {busy} busy, {self._served} connections served")

    def _finish(self) -> None:
        """Lets the workers finish their connections; with less patience after another signal."""
        stop = self._stop
        self._notifier.send("STOPPING=1")
        deadline = time.monotonic() + RELOAD_PATIENCE
        urgency = -1  # then 0: SIGHUP, 1: SIGTERM, 2: SIGTERM again
        while workers := self._workers():
            wanted = stop.requested + stop.at_once or int(time.monotonic() > deadline)
            if wanted > urgency:
                urgency = wanted
                for process in workers:
                    os.kill(process, signal.SIGTERM if urgency else signal.SIGHUP)
            poll = select.poll()
            poll.register(stop.wakeup.fd, select.POLLIN)
            poll.poll(min(1.0, self._notifier.interval / 2) * 1000)
            stop.wakeup.drain()
            self._notifier.alive()
            self._reap()


class Reporter:
    """Tells the parent the state of this worker, in master(8)'s form: two native ints, message and process id.

    fd: the pipe to the parent. When the parent has died, the worker leaves.
    """

    INT_SIZE = 4

    def __init__(self, fd: int, stop: Stop) -> None:
        self.fd, self._stop = fd, stop

    def report(self, message: int) -> None:
        """Tells AVAILABLE, UNAVAILABLE or CONNECTED."""
        numbers = (number.to_bytes(self.INT_SIZE, sys.byteorder) for number in (message, os.getpid()))
        try:
            os.write(self.fd, b"".join(numbers))
        except OSError as error:
            log.warning("parent process died", cause=error)
            self._stop.leaving = True

    @classmethod
    def parse(cls, reports: bytes) -> Iterator[tuple[int, int]]:
        """The reports in a parent's input: each message, with the process id of its worker."""
        ends = range(cls.INT_SIZE, len(reports) + 1, cls.INT_SIZE)
        numbers = (int.from_bytes(reports[end - cls.INT_SIZE : end], sys.byteorder) for end in ends)
        return zip(numbers, numbers)


class Notifier:
    """Tells systemd the state of the service, if systemd asks for it, see sd_notify(3).

    interval: the longest time between two calls of alive(), in seconds.
    """

    STATUS_INTERVAL = 1.0

    def __init__(self) -> None:
        self.interval = 3600.0
        self._send: Callable[[str], object] = lambda _state: None
        self._told = ""
        self._told_at = self._alive_at = 0.0
        self._watched = False
        if "NOTIFY_SOCKET" in os.environ:
            from systemd import daemon

            self._send = daemon.notify
            if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
                microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
                self._watched = microseconds > 0
                self.interval = microseconds / 2_000_000 if self._watched else self.interval

    def send(self, state: str) -> None:
        """Sends a state of sd_notify(3)."""
        self._send(state)

    def alive(self) -> None:
        """Sends the watchdog's keep-alive, when it is time."""
        if self._watched and time.monotonic() >= self._alive_at + self.interval / 2:
            self._alive_at = time.monotonic()
            self._send("WATCHDOG=1")

    def status(self, text: str) -> float:
        """Sends the status, but not too often; the seconds after which to call again."""
        self.alive()
        if text == self._told:
            return self.interval
        wait = self._told_at + self.STATUS_INTERVAL - time.monotonic()
        if wait > 0:
            return wait
        self._told, self._told_at = text, time.monotonic()
        self._send(f"STATUS={text}")
        return self.interval


def run(handler: ConnectionHandler) -> None:
    """Serves the sockets of master(8), systemd or inetd, else standard input. Raises ConfigError and OSError."""
    if "CYRUS_ID" in os.environ and is_listening(MASTER_LISTEN_FD):
        run_under_master(handler, os.environ["CYRUS_ID"])
        return
    sockets = sockets_from_systemd() if "LISTEN_FDS" in os.environ else []
    if not sockets and is_listening(0):
        sockets = [socket_from_inetd()]
    if any(is_listening(sock.fileno()) for sock in sockets):
        Pool(handler, sockets).run()
        return
    for connection in sockets:
        use_as_standard_io(connection.fileno())
        connection.close()
    if not sockets and not (sys.stdin and sys.stdout):  # None if they were closed when Python started
        raise OSError(errno.EBADF, "standard input or output is closed")
    handler.debug()
    handler.serve(Peer.of(0))


def run_under_master(handler: ConnectionHandler, identity: str) -> None:
    """Serves as a child of Cyrus master(8), which passes the descriptors 3 and 4. identity: CYRUS_ID."""
    for fd in (MASTER_STATUS_FD, MASTER_LISTEN_FD):
        os.set_inheritable(fd, False)
    path = f"{handler.config.configdirectory}/socket/{handler.service}-{identity}.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; configdirectory must be that of master(8)") from None
    import random

    timeout = handler.arguments.timeout * (1 + random.random())  # master's children must not leave all at once
    reporter = Reporter(MASTER_STATUS_FD, handler.stop)
    Worker(handler, [Socket(fileno=MASTER_LISTEN_FD)], reporter, timeout, preforked=True, lock=lock).run()


def is_listening(fd: int) -> bool:
    """Whether the descriptor is a listening socket."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
    except OSError:
        return False
    with Socket(fileno=os.dup(fd)) as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def sockets_from_systemd() -> list[Socket]:
    """The sockets that systemd passes: listening ones (Accept=no), or a connection (Accept=yes). Raises ConfigError."""
    try:
        from systemd import daemon
    except ImportError:
        raise ConfigError("systemd passes sockets, but the package systemd-python is not installed") from None
    fds = daemon.listen_fds(False)  # keeps the environment, which refuse_to_start() needs
    if not all(daemon.is_socket(fd, type=socket.SOCK_STREAM) for fd in fds):
        raise ConfigError("systemd passes a file that is not a stream socket: see ListenStream= in systemd.socket(5)")
    sockets = [Socket(fileno=fd) for fd in fds]
    if len(fds) > 1 and not all(map(is_listening, fds)):
        raise ConfigError("systemd passes a connection together with other sockets")
    for fd in fds:
        os.set_inheritable(fd, False)
    return sockets


def inherited_sockets() -> Iterator[int]:
    """The descriptors of the sockets that this process was started with."""
    count = os.environ.get("LISTEN_FDS", "")
    is_ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    passed = range(3, 3 + int(count)) if is_ours and count.isdigit() else ()
    for fd in sorted({0, MASTER_LISTEN_FD, *passed}):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                yield fd
        except OSError:
            continue  # it is closed


def is_on_internet() -> bool:
    """Whether this process was started with a socket that is not AF_UNIX."""
    for fd in inherited_sockets():
        with Socket(fileno=os.dup(fd)) as sock:
            if sock.family != socket.AF_UNIX:
                return True
    return False


def waiting_clients() -> Iterator[Socket]:
    """The connections that wait on the listening sockets of this process, or that systemd has passed."""
    for fd in inherited_sockets():
        sock = Socket(fileno=os.dup(fd))
        if is_listening(fd):
            sock.setblocking(False)
            while client := accept(sock):
                yield client
        elif fd not in (0, MASTER_LISTEN_FD):
            yield sock


def socket_from_inetd() -> Socket:
    """The listening socket that inetd's "wait" passes as standard input; /dev/null takes its place there."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    listener = Socket(fileno=os.dup(0))
    use_as_standard_io(null)
    os.close(null)
    return listener


# ======================================================================
# Main
#
# Owns the order of a start: command line, configuration, privileges, service,
# exit status.
# Must not know what is served.
# ======================================================================


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs lmtpd; the exit status of sysexits(3). arguments: by default those of the command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until Stop handles them
    fill_standard_descriptors()
    keep_stderr_from_client()  # also hides the warnings of imports from the client
    log.open()
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        service = os.environ.get("CYRUS_SERVICE", "lmtp")
        config = Config.load(options.config_file, service)
        log.open(config.syslog_prefix, config.syslog_facility, config.debug)
        if options.debugs and not config.debug_command:
            raise ConfigError("-D needs the option debug_command")
        may_need_tls = not options.trusts_internet and (options.expects_proxy or is_on_internet())
        # Before root's rights are given up: only root may be able to read the key.
        tls_context = load_tls_context(config) if may_need_tls else None
        tls_files = files_for_tls(config) if may_need_tls and config.allowstarttls else []
        drop_privileges(config.cyrus_user, keep=config.userdb != "maildir")
        os.umask(config.umask)
        log_settings(config)
        stop = Stop(ShutdownFile(f"{config.configdirectory}/msg/shutdown"))
        stop.install_handlers()
        run(ConnectionHandler(config, options, service, tls_context, tls_files, stop))
    except UsageError as error:
        log.startup_error("usage error", cause=error)
        return refuse_to_start(os.EX_USAGE, str(error))
    except ConfigError as error:
        log.startup_error("configuration error", cause=error)
        return refuse_to_start(os.EX_CONFIG, "Configuration error, see the log")
    except OSError as error:
        log.traceback("system error", cause=error)
        return refuse_to_start(os.EX_OSERR, "System error, see the log")
    except Exception:
        log.traceback("internal error")
        return refuse_to_start(os.EX_SOFTWARE, "Internal error, see the log")
    return os.EX_OK


def command() -> NoReturn:
    """The command lmtpd. It leaves without the interpreter's clean-up, which takes time and does nothing for us."""
    if sys.getfilesystemencoding() != "utf-8":  # a locale says so; names of files are UTF-8 for all who read Maildirs
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    status = main()
    if sys.stdout:
        sys.stdout.flush()
    os._exit(status)


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """The options of the command line. Raises UsageError, and SystemExit after --help and --version."""
    options: dict[str, Any] = NO_ARGUMENTS
    if arguments:
        from docopt import DocoptExit, docopt

        try:
            options = docopt(__doc__, arguments, version=PRODUCT)
        except DocoptExit as error:
            raise UsageError(str(error)) from None
    return Arguments(options)


def log_settings(config: Config) -> None:
    """Logs what is odd about the settings: at each start of a process that listens.

    A process that serves one connection logs it only if a file has changed since it was logged last.
    """
    for text in config.warnings:
        log.warning("odd setting", cause=text)
    if not config.ignored:
        return
    named = Stamp(f"{config.configdirectory}/options.named")
    changed = max(map(time_of_change, config.files))
    is_news = changed > named.time() or any(map(is_listening, inherited_sockets()))
    for where, name in config.ignored:
        if not is_news and not log.debugging:
            break
        if not is_cyrus_option(name):
            log.warning("unknown option", where=where, name=name, similar=similar_option(name))
        elif changes_mail(name):
            log.info("option without effect", where=where, name=name)
        else:
            log.debug("option ignored", where=where, name=name)
    if is_news:
        named.set()


def time_of_change(file: str) -> float:
    """When a file or its permissions changed last, by time.time(); 0 if that cannot be found out."""
    try:
        return os.stat(file).st_ctime
    except OSError:
        return 0


def refuse_to_start(status: int, text: str) -> int:
    """Sends 421 to the client, or to all that wait, so that they keep the mail in their queue; the exit status."""
    reply = Reply(421, "4.3.0", text).render()
    tell: list[Callable[[bytes], object]] = [client.send for client in waiting_clients()]
    if not stdout_is_journal():
        tell.append(lambda octets: os.write(1, octets))
    for say in tell:
        try:
            say(reply)
        except OSError:
            continue  # this one has gone
    return status


def drop_privileges(user: str, keep: bool) -> None:
    """Becomes the user if root has started the process. Raises ConfigError.

    keep: whether the process has to act as other users later. If not, it cannot become root again.
    """
    if os.geteuid() != 0:
        return
    if not user:
        raise ConfigError("refusing to run as root: set cyrus_user to the account that owns the Maildirs")
    import pwd

    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"cyrus_user: there is no account {user!r}; create it or name another") from None
    if account.pw_uid == 0:
        raise ConfigError("cyrus_user must not be root: set it to the account that owns the Maildirs")
    os.initgroups(user, account.pw_gid)
    if keep:
        os.setegid(account.pw_gid)
        os.seteuid(account.pw_uid)
    else:
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)


if __name__ == "__main__":
    command()
