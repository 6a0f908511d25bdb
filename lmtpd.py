"""Receive mail by LMTP on standard input or sockets, and deliver it into Maildirs.

Usage:
  lmtpd [-C config-file] [-U uses] [-T timeout] [-D] [-H] [-a]
  lmtpd [-C config-file] --check
  lmtpd [-C config-file] --check-sieve <script>...
  lmtpd [-C config-file] --config [all]
  lmtpd [-C config-file] --explain <address> [-f sender]
  lmtpd --help
  lmtpd --version

Options:
  -C config-file  Read options from this file [default: /etc/imapd.conf].
  -U uses         Connections a process serves before it exits [default: 250].
  -T timeout      Seconds to wait for a new connection, 0 for ever [default: 60].
  -D              Run the debugger of the debug_command option.
  -H              Expect a HAProxy PROXY header before the greeting.
  -a              Trust internet connections instead of requiring LMTP AUTH.
  --check         Check the configuration and the files that it names.
  --check-sieve   Check Sieve scripts, and name each error.
  --config        Show the options that differ from the default, or all.
  --explain       Say what would happen to mail for an address, and why.
  -f sender       The sender of that message; <> if it is not given.
  --help          Show this text.
  --version       Show the version.
"""

# The file follows the path of a message. Helpers come first, main() last. A section
# uses only the sections above it. The sections, and what each owns:
#
# Option types     what the values of options look like
# Configuration    the table of options, the syntax of imapd.conf(5)
# Logging          where a log line goes, and its form
# Replies          replies, and their form on the wire
# Stopping         what ends the process early: signals, timers, the shutdown file
# Metrics          counts and times of a pool's replies, for monitoring
# Connection       octets in and out, deadlines, TLS, who the peer is
# Local services   requests to daemons on this host
# Addresses        paths and parameters of commands; user, detail and domain of a recipient
# Files            identities, guarded paths, drafts, durable files and directories
# Message          what comes after DATA or BDAT: decoding, limits, header, added fields
# Fields           the syntax of header fields
# MIME             parts, encodings, charsets, HTML
# Maildir++        names of folders and files on the disk, quota, keywords, subscriptions, locks
# Mailboxes        a user's Maildir: folders, quota check, placing a message
# Users            the user databases
# Mailstore        the way from a recipient to a mailbox
# Records          the database of delivered messages, and of what scripts remember
# Shared records   the same in PostgreSQL, for several hosts
# Submission       how mail leaves: SMTP, sendmail
# Answers          messages that this host writes, and who must not get one
# Sieve: syntax    tokens and the grammar of scripts
# Sieve: matching  comparators, match types, patterns
# Sieve: actions   what scripts decide: copies, the implicit keep, what is sent
# Sieve: runs      one run: the message as a script sees it, variables, limits
# Sieve: language  the rows of the table of commands and tests; the checker
# Sieve: tests     the tests of scripts
# Sieve: sending   the commands that send mail
# Sieve: commands  the commands of scripts; the table
# Filters          whose scripts run, and in which order
# Delivery         one message and all its recipients: placements, replies to store errors
# Authentication   SASL mechanisms, password checks, who may deliver
# Session          the verbs, and the state of the transaction
# Service          the command line, and what serves a connection
# Workers          the processes of a pool, and their parent
# Sockets          where connections come from
# Questions        what the program says about itself without serving
# Main             command line, configuration, privileges, exit status

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
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
    from contextlib import AbstractContextManager
    from smtplib import SMTP
    from sqlite3 import Connection as Database
    from ssl import SSLContext
    from typing import IO, Any, ClassVar, NoReturn, Protocol, TypeVar, Union

    import psycopg

    T = TypeVar("T")
    Statement = tuple[str, Sequence[object]]  # in SQL, and the values of its parameters
    Mechanism = Generator[bytes, bytes, str]
    Text = Union[str, "Template"]  # an argument of a script
    Check = Callable[["Run"], bool]  # what runs a test
    Step = Callable[["Run"], None]  # what runs commands
else:
    # The modules signal and socket add enumerations of all constants to these two. Making the enumerations takes more
    # than half of the time that the interpreter itself takes to start.
    import _signal as signal
    import _socket as socket

__version__ = "0.4.1"

PRODUCT = f"lmtpd {__version__}"
CRLF, LF = b"\r\n", b"\n"
READ_SIZE = 65536  # octets read at a time
FOREVER = float("inf")  # a deadline that never comes
# docopt's result for an empty command line, written out because importing docopt takes as long as starting Python.
NO_ARGUMENTS: dict[str, Any] = {
    "-C": "/etc/imapd.conf",
    "-U": "250",
    "-T": "60",
    "-f": None,
    "<address>": None,
    "<script>": [],
    **dict.fromkeys(("-D", "-H", "-a", "--check", "--check-sieve", "--config", "--explain", "all"), False),
    **dict.fromkeys(("--help", "--version"), False),
}
# The options of the first usage, and whether the next word is their value.
SERVING_OPTIONS = {"-C": True, "-U": True, "-T": True, "-D": False, "-H": False, "-a": False}


# ======================================================================
# Option types
#
# Owns what the values of options look like. Each type takes the text of a value
# and returns the value, or raises ValueError with a text that continues "'value' ...".
# Must not know the options.
# ======================================================================

SWITCHES = {
    **dict.fromkeys(("yes", "on", "true", "t", "1"), True),
    **dict.fromkeys(("no", "off", "false", "f", "0"), False),
}
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
OCTETS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
DECIMAL_DIGITS = frozenset("0123456789")
SMTP_PORTS = {"smtp": "25", "submission": "587"}
BRACKET_CLASSES = {"[:digit:]": "0-9", "[:alpha:]": "a-zA-Z", "[:alnum:]": "a-zA-Z0-9", "[:space:]": r"\s"}


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


def as_lower_names(value: str) -> tuple[str, ...]:
    """Names with white space between them, in any case."""
    return as_names(value.lower())


def as_field_pattern(value: str) -> str:
    """The name of a header field, or "Name: regular expression", whose first group is what matters; "" for none."""
    pattern = value.partition(":")[2].strip()
    if pattern:
        import re

        try:
            re.compile(with_python_classes(pattern))
        except re.error as error:
            raise ValueError(f"has a regular expression that is wrong: {error}") from None
    return value


def with_python_classes(pattern: str) -> str:
    """A POSIX regular expression as Python's re takes it."""
    for posix, python in BRACKET_CLASSES.items():
        pattern = pattern.replace(posix, python)
    return pattern


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


def as_decimal(value: str) -> str:
    """A number above 0, perhaps with a decimal point."""
    whole, _, fraction = value.partition(".")
    if not DECIMAL_DIGITS.issuperset(whole + fraction) or not (whole + fraction).strip("0"):
        raise ValueError("must be a number above 0, such as 10 or 5.5")
    return value


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


def as_smtp_host(value: str) -> tuple[str, int, frozenset[str]]:
    """A host, perhaps with a port, and /tls or /noauth: mx.example.com:25/tls. The host, the port, and the words."""
    place, *words = value.lower().split("/")
    if not {"tls", "noauth"}.issuperset(words):
        raise ValueError("may have /tls and /noauth at its end")
    return *parse_server(place, "587"), frozenset(words)


def as_servers(value: str) -> tuple[tuple[str, int], ...]:
    """PostgreSQL servers with commas between them: hosts, perhaps with ports, or directories of unix sockets."""
    return tuple(parse_server(server.strip(), "5432") for server in value.split(",")) if value else ()


def parse_server(server: str, port: str) -> tuple[str, int]:
    """The host and the port, or the port that is given, of a server such as [::1]:25. Raises ValueError."""
    host, colon, number = server.rpartition(":")
    if not colon or number.endswith("]"):  # an IPv6 address in brackets
        host, number = server, port
    number = SMTP_PORTS.get(number.lower(), number)
    if len(host.split()) != 1 or not DECIMAL_DIGITS.issuperset(number) or not 0 < int(number or 0) < 65536:
        raise ValueError(f"must be a host and perhaps a port, such as localhost:{port}")
    return host.strip("[]"), int(number)


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


# ======================================================================
# Configuration
#
# Owns the table of options and the syntax of imapd.conf(5).
# Must not know what the options do.
# ======================================================================

FILES_LIMIT = 100  # the most files of a configuration
OPTION_PUNCTUATION = str.maketrans("", "", "-_")
TLS_VERSIONS = ("tls1_0", "tls1_1", "tls1_2", "tls1_3")
FACILITIES = {  # syslog(3)
    **{name: number << 3 for number, name in enumerate(("kern", "user", "mail", "daemon", "auth", "syslog", "lpr"))},
    **{name: number << 3 for number, name in enumerate(("news", "uucp", "cron", "authpriv", "ftp"), 7)},
    **{f"local{number}": 16 + number << 3 for number in range(8)},
}
PROTECTED_FIELDS = "auto-submitted delivered-to received return-path"
SCORE_TYPES = ("score", "strlen", "text")
CA_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
DUPLICATE_DATABASES = (  # all of these but sql mean our SQLite file
    *("sqlite", "sql", "twoskip", "skiplist", "zeroskip", "lmdb", "flat"),
    *("berkeley", "berkeley-nosync", "berkeley-hash", "berkeley-hash-nosync"),
)
TEST_TEXTS = {"spam": 10, "virus": 5}  # the highest N of the options sieve_spamtest_text_valueN and the like
XLIST = "xlist-"  # before the special use, in the name of an option
# The options of Cyrus IMAP 3.6 to 3.10 that lmtpd does not implement. Those of the first group change what happens to
# mail.
CHANGING_OPTIONS = """
    autocreate_sieve_compiled_script autocreate_sieve_folders autocreate_sieve_script
    autocreate_sieve_script_compile autocreate_sieve_script_compiled mailbox_initial_flags mailnotifier
    notifysocket proxyservers sendmail_auth_id sieve_allowreferrals sieve_folder sieve_maxscripts
    sieve_sasl_send_unsolicited_capability sieve_utf8fileinto sievenotifier smtp_auth_realm userdeny_db
    userdeny_db_path username_tolower
"""
OTHER_OPTIONS = """
    acl_admin_implies_write afspts_localrealms afspts_mycell allowallsubscribe allowanonymouslogin allowapop
    allowdeleted allownewnews allowsetacl allowusermoves altnamespace altprefix anyoneuseracl anysievefolder
    auditlog auth_mech autocreate_acl autocreate_subscribe_sharedfolders autocreate_subscribe_sharedfolders_all
    autocreateinboxfolders autocreatequota autocreatequotamsg autoexpunge autosievefolders
    autosubscribe_all_sharedfolders autosubscribeinboxfolders autosubscribesharedfolders boundary_limit
    client_bind client_bind_name client_timeout commandmintimer createonpost crossdomains crossdomains_onlyother
    cyrus_group debug_log_sync_partition_choice debug_writefail_guid defaultacl defaultsearchtier defaultserver
    delete_mode delete_unsubscribe deletedprefix deleteright disable_shared_namespace disable_user_namespace
    disconnect_on_vanished_mailbox expunge_mode failedloginpause flushseenstate foolstupidclients
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
    partition_select_ pop prometheus_ proxyd_ proxy_ pts rss_ sasl_ search_ serverlist sync_ srs_ vcard_
    virusscan_ xbackup_ zoneinfo_
"""
SIMILARITY_MINIMUM = 0.8  # how similar the name of an option is to a misspelt one, by difflib


class ConfigError(Exception):
    """The configuration cannot be used. texts: each error, where it is, and what to do."""

    def __init__(self, *texts: str) -> None:
        more = f" (and {len(texts) - 1} more: see lmtpd --check)" if len(texts) > 1 else ""
        super().__init__(texts[0] + more)
        self.texts = texts


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
    autocreate_quota = option(as_kibioctets, "-1", "the quota of a new Maildir in units of 1024 bytes; -1: none")
    autocreate_quota_messages = option(as_count_or_none, "-1", "the most messages of a new Maildir; -1: no limit")
    autocreate_subscribe_folders = option(as_folders, "", "the folders to which a new user is subscribed")
    autocreate_users = option(as_names, "anyone", "users whose Maildirs are made: userids, group:NAME, anyone")
    chatty = option(as_switch, "no", "log every command")
    configdirectory = option(as_path, None, "the directory for lmtpd's own files")
    cyrus_user = option(as_text, "", "the account to run as when started by root")
    debug = option(as_switch, "no", "log details that help to find a fault")
    debug_command = option(as_command, "", "the command that -D runs")
    default_quota = option(as_octets, "0", "the quota of a Maildir that has none of its own, in bytes; 0: none")
    default_quota_messages = option(as_number, "0", "the most messages of such a Maildir; 0: no limit")
    defaultdomain = option(as_text, "", "the domain that userids leave out")
    defaultpartition = option(as_text, "", "the partition of the Maildirs; needed only when there are several")
    duplicate_db = option(as_choice(*DUPLICATE_DATABASES), "sqlite", "where delivered messages are recorded")
    duplicate_db_path = option(optional(as_path), "", "the SQLite file of them; by default configdirectory/deliver.db")
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
    lmtp_strict_quota = option(as_switch, "no", "refuse a message that would not fit, not only mail for a full mailbox")
    lmtp_strict_rfc2821 = option(as_switch, "yes", "refuse non-ASCII addresses without SMTPUTF8")
    maildir_path = option(as_template("pundh"), "%p/%u", "the path of a user's Maildir")
    maxmessagesize = option(as_octets, "0", "the largest message accepted, in bytes; 0: no limit")
    metrics_path = option(optional(as_path), "", "the file to which a pool writes its metrics")
    munge8bit = option(as_switch, "no", "replace non-ASCII bytes in message headers by X")
    passwd_min_uid = option(as_number, "1000", "with userdb: passwd, accounts with a lower user id have no mailbox")
    postmaster = option(as_text, "postmaster", "the user who gets the mail of postmaster")
    postuser = option(as_text, "", "the user part of addresses of shared folders")
    quota_exclude_deleted = option(as_switch, "no", "do not count messages that are marked as deleted in a quota")
    quota_exclude_folders = option(as_folders, "", "folders that do not count in a quota")
    recipient_delimiter = option(as_delimiters, "+", "characters that divide the user from the detail of an address")
    reject8bit = option(as_switch, "no", "refuse messages with non-ASCII bytes in the header")
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
    sendmail = option(as_path, "/usr/sbin/sendmail", "the program that sends mail")
    serverinfo = option(
        as_choice("on", "min", "off"), "on", "whether the greeting and the trace header show the product"
    )
    servername = option(as_text, "", "the name of this host in replies and headers; by default the system's")
    shared_maildir = option(optional(as_path), "", "the Maildir of the shared folders")
    sieve_after = option(optional(as_path), "", "the Sieve script, or directory of scripts, that runs after the user's")
    sieve_before = option(optional(as_path), "", "the Sieve script, or directory of scripts, that runs first")
    sieve_default = option(optional(as_path), "", "the Sieve script of users who have none")
    sieve_duplicate_max_expiration = option(as_duration, "90d", "the longest time that the test duplicate remembers")
    sieve_editheader_protected = option(as_lower_names, PROTECTED_FIELDS, "header fields that no script may change")
    sieve_extensions = option(as_lower_names, "", "the Sieve capabilities that scripts may use; by default all")
    sieve_global_dir = option(optional(as_path), "", "the directory of the scripts for include :global")
    sieve_maxscriptsize = option(
        limited(as_kibioctets, "1", "10240"), "64", "the largest Sieve script, in units of 1024 bytes"
    )
    sieve_script = option(
        optional(as_template("pundh")), "", "the path of a user's Sieve script; by default ~/.dovecot.sieve"
    )
    sieve_spamtest_max_header = option(as_field_pattern, "", "the field with the highest score of the test spamtest")
    sieve_spamtest_max_value = option(optional(as_decimal), "", "the highest score of the test spamtest")
    sieve_spamtest_status_header = option(as_field_pattern, "", "the field with the score of the test spamtest")
    sieve_spamtest_status_type = option(as_choice(*SCORE_TYPES), "score", "how that field tells the score")
    sieve_subaddress_folder = option(
        as_switch, "yes", "whether keep files mail for a sub-address into the folder that the sub-address names"
    )
    sieve_use_lmtp_reject = option(as_switch, "yes", "whether reject answers the client, and sends no report")
    sieve_vacation_max_response = option(as_duration, "90d", "the longest time between two vacation answers")
    sieve_vacation_min_response = option(as_duration, "3d", "the shortest time between two vacation answers")
    sieve_vacation_min_seconds = option(as_duration, "60s", "the same for the tag :seconds")
    sieve_virustest_max_header = option(as_field_pattern, "", "the field with the highest score of the test virustest")
    sieve_virustest_max_value = option(optional(as_decimal), "", "the highest score of the test virustest")
    sieve_virustest_status_header = option(as_field_pattern, "", "the field with the score of the test virustest")
    sieve_virustest_status_type = option(as_choice(*SCORE_TYPES), "score", "how that field tells the score")
    sievedir = option(optional(as_path), "", "the directory of the users' Sieve scripts, as Cyrus up to 3.4 has it")
    sieveusehomedir = option(as_switch, "no", "whether a user's Sieve script is ~/.sieve")
    singleinstancestore = option(as_switch, "yes", "store a message as one file with hard links for its recipients")
    smtp_auth_authname = option(as_text, "", "the user as whom lmtpd authenticates to smtp_host")
    smtp_auth_password = option(as_text, "", "the user's password")
    smtp_backend = option(as_choice("sendmail", "host"), "sendmail", "whether sendmail or smtp_host sends mail")
    smtp_host = option(as_smtp_host, "localhost:587", "the server that sends mail")
    smtp_tls_ca_file = option(as_file, "", "the file of CA certificates that verify that of smtp_host")
    soft_noauth = option(as_switch, "yes", "refuse unauthenticated clients temporarily (430), not permanently (530)")
    sql_database = option(as_text, "", "the PostgreSQL database of duplicate_db: sql")
    sql_engine = option(as_text, "pgsql", "the kind of that database; pgsql is the only one")
    sql_hostnames = option(as_servers, "", "the hosts of that database; the first that answers is used")
    sql_passwd = option(as_text, "", "the password for that database")
    sql_tls_ca_file = option(as_file, CA_CERTIFICATES, "the CA certificates that verify that of the database")
    sql_user = option(as_text, "", "the user of that database")
    sql_usessl = option(as_switch, "no", "use that database only by TLS, and verify its certificate")
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
    test_texts: dict[str, dict[int, str]]  # of the tests spamtest and virustest: the results and the texts for them
    special_uses: dict[str, str]  # special uses (RFC 6154) and their folders, from the options xlist-USE
    settings: dict[str, str]  # the options that are set, as the files have them
    ignored: list[tuple[str, str]]  # options that have no effect, each "file:line" and the name
    read_only = False  # whether this process only answers a question, and so must not write anything
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
        errors: list[str] = []
        settings, files = read_settings(file, errors)
        is_whole = not errors  # else the line that is missing may be in what could not be read
        config = cls()
        config.files, config.settings = tuple(files), {name: value for name, (value, _) in settings.items()}
        for take in (set_options, set_partition):
            errors += [text for is_missing, text in take(config, settings, service) if is_whole or not is_missing]
        if errors:
            raise ConfigError(*errors)
        config.servername = config.servername or socket.gethostname()
        config.defaultdomain = config.defaultdomain.lower()
        config.test_texts = {test: texts_of_results(test, settings) for test in TEST_TEXTS}
        config.special_uses = special_uses(settings, service)
        config.ignored = [(where, name) for name, (_, where) in settings.items() if "partition-" not in name]
        config.warnings = odd_settings(config)
        return config


def set_options(config: Config, settings: dict[str, tuple[str, str]], service: str) -> Iterator[tuple[bool, str]]:
    """Takes the options of the table from the settings. For each that cannot be used: is it missing, and the error."""
    for name, row in Config.table().items():
        override = settings.pop(f"{service}_{name}", None)
        setting = settings.pop(name, None)
        value, where = override or setting or (row.default, "")
        if value is None:
            yield True, f"{config.files[0]}: {name} must be set; add a line '{name}: ...'"
            continue
        try:
            setattr(config, name, parsed(row.parse, name, (value, where)))
        except ConfigError as error:
            yield False, str(error)


def special_uses(settings: dict[str, tuple[str, str]], service: str) -> dict[str, str]:
    """Takes the options xlist-USE from the settings: the folders by their special uses."""
    folders = {}
    for prefix in (XLIST, f"{service}_{XLIST}"):  # the latter overrides the other
        for name in [name for name in settings if name.startswith(prefix)]:
            folders[f"\\{name[len(prefix) :]}"] = settings.pop(name)[0]
    return folders


def odd_settings(config: Config) -> list[str]:
    """What does not fit together in the settings, for the log."""
    texts = []
    for limit in ("lmtp_maxchild", "lmtp_maxchild_untrusted"):
        allowed = getattr(config, limit)
        if 0 < allowed < config.lmtp_prefork:
            text = f"lmtp_prefork is {config.lmtp_prefork}, but {limit} allows {allowed}: lower it, or raise {limit}"
            texts.append(text)
    return texts


def texts_of_results(test: str, settings: dict[str, tuple[str, str]]) -> dict[int, str]:
    """Takes the options sieve_spamtest_text_valueN or those of virustest from the settings: the texts by their N."""
    names = {f"sieve_{test}test_text_value{number}": number for number in range(TEST_TEXTS[test] + 1)}
    return {number: settings.pop(name)[0] for name, number in names.items() if name in settings}


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


def set_partition(config: Config, settings: dict[str, tuple[str, str]], service: str) -> Iterator[tuple[bool, str]]:
    """Sets the directory of all Maildirs: the partition, or the beginning of maildir_path. Errors as set_options()."""
    config.partition = ""
    if isinstance(config.maildir_path, Option) or isinstance(config.defaultpartition, Option):
        return  # it is wrong, and has been named
    if "p" not in template_variables(config.maildir_path):
        config.partition = os.path.dirname(config.maildir_path.partition("%")[0])
        return
    names = [name for name in settings if name.startswith("partition-")]
    name = f"partition-{config.defaultpartition.lower() or 'default'}"
    if len(names) == 1 and not config.defaultpartition:
        name = names[0]
    setting = settings.get(f"{service}_{name}") or settings.get(name)
    if not setting:
        yield True, f"{config.files[0]}: {name} must be set; add a line '{name}: /path/to/the/maildirs'"
        return
    try:
        config.partition = parsed(as_path, name, setting)
    except ConfigError as error:
        yield False, str(error)


def parsed(parse: Callable[[str], T], name: str, setting: tuple[str, str]) -> T:
    """The value of a setting, which is ("text", "file:line"). Raises ConfigError."""
    value, where = setting
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {name}: {value!r} {error}") from None


def read_settings(file: str, errors: list[str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """The settings of a file and the files that it includes, as {name: (value, "file:line")}, and a list of the files.

    Adds a text to errors for each line and file that cannot be used.
    """
    settings: dict[str, tuple[str, str]] = {}
    seen: list[str] = []

    def read(name: str) -> None:
        real = os.path.realpath(name)
        if real in seen:
            raise ValueError("is included twice")
        if len(seen) >= FILES_LIMIT:
            raise ValueError(f"is one of more than {FILES_LIMIT} files")
        seen.append(real)
        for where, key, value in read_lines(name, errors):
            if key == "@include":
                included = os.path.join(os.path.dirname(name), value)
                attempt(included, f"{where}: {included}")
            elif key in settings:
                errors.append(f"{where}: {key} is set already at {settings[key][1]}; remove one of the two")
            else:
                settings[key] = value, where

    def attempt(name: str, where: str) -> None:
        try:
            read(name)
        except OSError as error:
            errors.append(f"{where}: {error.strerror}")
        except ValueError as error:
            errors.append(f"{where}: {error}")

    attempt(file, file)
    return settings, seen


def read_lines(file: str, errors: list[str]) -> Iterator[tuple[str, str, str]]:
    """Each setting in a file, as ("file:line", key, value). Adds a text to errors for any other line.

    Raises OSError.
    """
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
        try:
            key, value = parse_setting(line)
        except ValueError as error:
            errors.append(f"{where}: {error}")
        else:
            yield where, key, value


def parse_setting(line: bytes) -> tuple[str, str]:
    """The name and the value in a line. Raises ValueError."""
    if b"\0" in line:
        raise ValueError("there is a NUL byte")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    key, colon, value = text.partition(":")
    is_key = key.isascii() and key.translate(OPTION_PUNCTUATION).isalnum()
    key, value = key.lower(), value.strip()
    if not colon or not (is_key or key == "@include"):
        raise ValueError(f"{text!r} is not of the form 'option: value'")
    if not value:
        raise ValueError(f"{key} has no value; remove the line to get the default")
    return key, value


# ======================================================================
# Logging
#
# Owns where a log line goes and its form: "event key=value ...".
# Must not know what happened.
# ======================================================================

LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG = 3, 4, 6, 7  # syslog(3)
SYSLOG_SOCKET = "/dev/log"
JOURNAL_SOCKET = "/run/systemd/journal/socket"
JOURNAL_FIELDS_LIMIT = 1000  # the journal drops an entry with more than 1024, a few of which are its own
FIELD_LIMIT = 1000  # characters of a value; syslog(3) may lose lines of more than 8 KiB
BARE = frozenset(map(chr, range(33, 127))) - frozenset('"=\\')  # characters that need no quotes in a value


class Log:
    """One line for each event: to the journal, else to syslog(3), else to standard error."""

    def __init__(self) -> None:
        self.debugging = False
        self._journal: Journal | None = None
        self._emit: Callable[[int, str], object] = to_stderr
        self._context: dict[str, object] = {}
        self._logged: set[str] = set()

    def open(self, prefix: str = "", facility: str = "mail", debugging: bool = False) -> None:
        """Chooses where lines go, see sd-daemon(3) and syslog(3). It may be called again."""
        self.debugging = debugging
        if stderr_is_journal():
            self._journal = Journal.connect(facility) if stderr_is_socket() else None
            self._emit = to_journal
        elif os.path.exists(SYSLOG_SOCKET):
            import syslog

            syslog.openlog(f"{prefix}/lmtpd" if prefix else "lmtpd", syslog.LOG_PID, FACILITIES[facility])
            self._emit = syslog.syslog
        else:
            self._emit = to_stderr

    def send_to(self, emit: Callable[[int, str], object]) -> None:
        """Sends lines to a function, which takes the priority of syslog(3) and the line."""
        self._journal, self._emit = None, emit

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

            lines = traceback.format_exc().splitlines()
        except Exception:  # no descriptor or memory is left, or the user may not read Python's files
            lines = [repr(error)]
        for line in lines:
            self._line(LOG_ERR, "traceback", {"line": line})

    def startup_error(self, event: str, **fields: object) -> None:
        """Logs why the program does not start, and writes it to standard error for the person at a terminal."""
        line = self._line(LOG_ERR, event, fields)
        if self._emit not in (to_stderr, to_journal):
            to_stderr(LOG_ERR, line)

    def _line(self, level: int, event: str, fields: dict[str, object]) -> str:
        """Logs a line, and returns it."""
        fields = {**self._context, **fields}
        line = " ".join([event, *[f"{name}={quoted(text_of(value))}" for name, value in fields.items()]])
        if not (self._journal and self._journal.send(level, line, event, fields)):
            self._emit(level, line)
        return line


class LogContext:
    """See Log.context(). Every log line has the fields until the block ends."""

    def __init__(self, context: dict[str, object], fields: dict[str, object]) -> None:
        self._context, self._fields = context, fields

    def __enter__(self) -> None:
        self._context.update(self._fields)

    def __exit__(self, *_: object) -> None:
        for name in self._fields:
            del self._context[name]


class Journal:
    """A connection to the journal, by which each field of a line can be searched for.

    Source: systemd's "Native Journal Protocol", systemd.journal-fields(7). It needs no import: that of systemd-python's
    systemd.journal takes longer than the interpreter takes to start.
    """

    def __init__(self, sock: socket.socket, facility: str) -> None:
        self._socket = sock
        self._common = b"SYSLOG_IDENTIFIER=lmtpd\nSYSLOG_FACILITY=%d\n" % (FACILITIES[facility] >> 3)

    @classmethod
    def connect(cls, facility: str) -> Journal | None:
        """A connection; None if there is no journal."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.connect(JOURNAL_SOCKET)
        except OSError:
            return None
        return cls(sock, facility)

    def send(self, level: int, line: str, event: str, fields: dict[str, object]) -> bool:
        """Sends a line with its fields, each as LMTPD_NAME; whether it was taken."""
        parts = [self._common, journal_field("PRIORITY", str(level)), journal_field("MESSAGE", line)]
        parts.append(journal_field("LMTPD_EVENT", event))
        for name, value in fields.items():
            values = value if isinstance(value, Addresses) else [text_of(value)]
            parts += [journal_field(f"LMTPD_{name.upper()}", without_brackets(each)) for each in values]
        if len(parts) > JOURNAL_FIELDS_LIMIT:
            return False
        try:
            self._socket.send(b"".join(parts))
        except OSError:
            return False
        return True


def journal_field(name: str, value: str) -> bytes:
    """A field in the form of the journal's protocol; one of several lines has its length before it."""
    octets = value[:FIELD_LIMIT].encode("utf-8", "backslashreplace") if name != "MESSAGE" else value.encode()
    if "\n" not in value:
        return b"%b=%b\n" % (name.encode(), octets)
    return b"%b\n%b%b\n" % (name.encode(), len(octets).to_bytes(8, "little"), octets)


def without_brackets(value: str) -> str:
    """An address or Message-ID without its angle brackets, as one types it in a search; <> stays."""
    return value[1:-1] if len(value) > 2 and value[0] == "<" and value[-1] == ">" else value


class Addresses(list[str]):
    """The addresses in a log field, of which each is a value of its own in the journal."""

    def __str__(self) -> str:
        return ", ".join(f"<{address}>" for address in self)


def text_of(value: object) -> str:
    """The value of a log field as text; an error of the system as "path: reason (as uid 1000)", as far as it is known.

    The user id is there if the error has passed a PathInErrors.
    """
    if not isinstance(value, OSError) or not value.strerror:
        return str(value)
    # A call with a descriptor gives that as the name.
    names = [os.fsdecode(name) for name in (value.filename, value.filename2) if name and not isinstance(name, int)]
    path = f"{' to '.join(names)}: " if names else ""
    user = getattr(value, "uid", None)
    return f"{path}{value.strerror}" + ("" if user is None else f" (as uid {user})") + hint_at_paths(value)


def hint_at_paths(error: OSError) -> str:
    """What to do about a file system that only systemd makes read-only for this process; "" for another error."""
    if error.errno != errno.EROFS or "INVOCATION_ID" not in os.environ:
        return ""
    return ": add its directory to ReadWritePaths= of the unit, see /opt/lmtpd/units/elsewhere.conf"


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


def stderr_is_socket() -> bool:
    """Whether standard error is a socket, as the stream to a running journal is."""
    return stat.S_ISSOCK(os.fstat(2).st_mode)


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
# Metrics
#
# Owns the counts and times of a pool's replies, the way from workers to their parent,
# and the file that shows them.
# Must not know what is counted.
# ======================================================================

METRICS_INTERVAL = 10.0  # seconds between two writings of the file
REFUSAL = 0xFFFFFFFF  # in place of the milliseconds of a reply to a recipient, for a command that is refused
SUBJECTS, DETAILS = 10_000, 100  # a reply as a number: 250 2.1.5 is 2500105
REPORT_SIZE = 8  # octets: the number of a reply, and milliseconds


class Metrics:
    """Counts of replies, written as OpenMetrics text. file: where; "" for nowhere.

    fd: readable when a worker has reported; -1 if there is no file. Workers never wait: a report that finds the pipe
    full is dropped.
    Source: the OpenMetrics specification 1.0.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self.fd, self._reported = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if file else (-1, -1)
        self._deliveries: dict[int, tuple[int, int]] = {}  # by the number of a reply: how many, and milliseconds
        self._refusals: dict[int, int] = {}
        self._written = b""
        self._written_at = -FOREVER

    def report(self, reply: Reply, ms: int) -> None:
        """Tells the parent a reply. ms: milliseconds since the message was complete, or REFUSAL."""
        _, subject, detail = map(int, (reply.enhanced or "0.0.0").split("."))
        number = reply.code * SUBJECTS + subject * DETAILS + detail
        try:
            os.write(self._reported, number.to_bytes(4, sys.byteorder) + min(ms, REFUSAL).to_bytes(4, sys.byteorder))
        except OSError:
            return  # the parent has died, or has no time

    def read(self) -> None:
        """Counts what workers have reported."""
        try:
            while reports := os.read(self.fd, READ_SIZE):
                for start in range(0, len(reports), REPORT_SIZE):
                    number, ms = (reports[at : at + 4] for at in (start, start + 4))
                    self._count(int.from_bytes(number, sys.byteorder), int.from_bytes(ms, sys.byteorder))
        except BlockingIOError:
            return

    def _count(self, number: int, ms: int) -> None:
        if ms == REFUSAL:
            self._refusals[number] = self._refusals.get(number, 0) + 1
            return
        count, total = self._deliveries.get(number, (0, 0))
        self._deliveries[number] = count + 1, total + ms

    def write(self, ready: int, busy: int, connections: int, at_once: bool = False) -> float:
        """Writes the file if something has changed, but not too often; the seconds after which to call again.

        ready, busy: workers. connections: those that have been served.
        """
        if not self._file:
            return FOREVER
        wait = self._written_at + METRICS_INTERVAL - time.monotonic()
        if wait > 0 and not at_once:
            return wait
        text = self._text(ready, busy, connections)
        if text == self._written:
            return FOREVER
        self._written_at = time.monotonic()
        try:
            replace_text_file(self._file, text)
            self._written = text
        except OSError as error:
            log.warning_once("metrics-not-written", cause=error)
        return METRICS_INTERVAL

    def _text(self, ready: int, busy: int, connections: int) -> bytes:
        lines = ["# TYPE lmtpd_delivery_seconds summary"]
        for number, (count, ms) in sorted(self._deliveries.items()):
            lines.append(f"lmtpd_delivery_seconds_count{{{labels(number)}}} {count}")
            lines.append(f"lmtpd_delivery_seconds_sum{{{labels(number)}}} {ms / 1000}")
        lines.append("# TYPE lmtpd_refusals counter")
        for number, count in sorted(self._refusals.items()):
            lines.append(f"lmtpd_refusals_total{{{labels(number)}}} {count}")
        lines += ["# TYPE lmtpd_connections counter", f"lmtpd_connections_total {connections}"]
        lines += ["# TYPE lmtpd_workers gauge", f'lmtpd_workers{{state="ready"}} {ready}']
        lines += [f'lmtpd_workers{{state="busy"}} {busy}', "# EOF", ""]
        return "\n".join(lines).encode()


def labels(number: int) -> str:
    """The labels of a reply, which is a number as in Metrics.report()."""
    code, status = divmod(number, SUBJECTS)
    subject, detail = divmod(status, DETAILS)
    return f'code="{code}",status="{f"{code // 100}.{subject}.{detail}" if status else ""}"'


def replace_text_file(path: str, text: bytes) -> None:
    """Writes a file that everybody may read, in one step for its readers. Raises OSError."""
    draft = f"{path}.new"
    try:
        os.unlink(draft)  # it may be another user's, a link or a pipe
    except FileNotFoundError:
        pass
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o644)  # whatever the umask
        if os.write(fd, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), draft)
    finally:
        os.close(fd)
    os.rename(draft, path)


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


END_OF_FILE = "end of file"


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
            raise Disconnected(END_OF_FILE)
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
        try:
            if not stat.S_ISSOCK(os.fstat(self._sink).st_mode):
                return
            with Socket(fileno=os.dup(self._sink)) as sock:
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
        events = polled(poll, timeout)
        if len(events) == 1 and events[0][0] != self._wakeup:
            return True  # the usual case
        while ready := {fd for fd, _ in polled(poll, deadline - time.monotonic())}:
            if poll is self._writable and self._sink in ready:
                return True  # the reply to finished work comes before the signal
            if self._wakeup in ready:
                self.on_wakeup()
            if ready - {self._wakeup}:
                return True
        return False


def polled(poll: select.poll, timeout: float) -> list[tuple[int, int]]:
    """The events that happen within timeout seconds. Raises Disconnected if the system cannot tell them."""
    try:
        return poll.poll(max(timeout, 0) * 1000)
    except OSError as error:
        raise Disconnected(f"poll: {error.strerror}") from None


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
            raise Disconnected(END_OF_FILE)
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
            raise Disconnected(END_OF_FILE)
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
        log.error("starttls-not-offered", cause=problem)
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


def prepare_services() -> None:
    """Imports what is needed, before workers fork."""
    import socket  # noqa: F401


def connect_to_service(path: str) -> socket.socket:
    """A connection to a daemon on this host. Raises Unavailable."""
    sock = None
    try:
        from socket import socket as buffered_socket  # it has makefile()

        sock = buffered_socket(socket.AF_UNIX)
        # With settimeout(), connect() would fail at once while the queue of the listener is full, see unix(7).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SERVICE_TIMEOUT.to_bytes(8, sys.byteorder) + bytes(8))
        sock.connect(path)
        sock.settimeout(SERVICE_TIMEOUT)
    except (ImportError, OSError) as error:
        if sock:
            sock.close()
        raise Unavailable(with_path(path, error)) from None
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

    @classmethod
    def check(cls, path: str) -> None:
        """Whether Dovecot answers there: it speaks first."""
        service = cls(path)
        try:
            if service.hear()[0] != "VERSION":
                raise Unavailable(f"{path}: is not a socket of Dovecot's authentication service")
        finally:
            service.close()


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

    file: tells the other processes of it, for many serve one connection each; "" for none.
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
        log.warning_once("domain-has-one-spelling", domain=domain, cause=cause)
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
RANDOM_NUMBERS: dict[int, str] = {}  # by process id: a worker needs another number than its parent
HOST = socket.gethostname().replace("/", "\\057").replace(":", "\\072")  # escaped as in maildir(5)
WRITEBACK_SIZE = 1 << 20  # octets after which the disk starts to write
FILE_TRIES = 4  # times that a file is opened which is replaced meanwhile
STALE_PAUSE = 0.5  # seconds; for one second some file systems of several hosts remember what a name led to
SYNC_IMPOSSIBLE = (errno.EINVAL, errno.EOPNOTSUPP)  # errors of a file system that cannot sync a directory
FS_IOC_FIEMAP = 0xC020660B
# struct fiemap: all of the file, FIEMAP_FLAG_SYNC, and no room for extents, so that they are only counted.
COUNT_WRITTEN_EXTENTS = bytes(8) + b"\xff" * 8 + (1).to_bytes(4, sys.byteorder) + bytes(12)
ONE_COMMIT_LINUX = (6, 1)  # nothing older has been tried; before 5.8 the ioctl hides errors
UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # errors of a system without O_TMPFILE: open(2)
THIS_LINK_ONLY = (errno.EMLINK, errno.EEXIST, errno.ENOENT, errno.ENOSPC, errno.EDQUOT)  # another link may succeed
NO_FAST_COMMITS = b"\n0 commits\n0 ineligible\n"
ORDERED_MODES = frozenset((b"data=ordered", b"data=journal"))  # of ext4
SHARED_FILE_SYSTEMS = (  # besides those that begin with "fuse."
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "glusterfs", "lustre", "nfs", "nfs4", "orangefs", "smb3"),
)
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_UNNAMED_FILE = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
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
            log.error("identity-not-restored", cause=error)
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
    """A file that no reader sees until it is linked or moved to its place.

    path: the file's, for errors. identity: the owner of the file. Raises OSError, save for discard(). Source:
    maildir(5).
    """

    def __init__(self, fd: int, path: str, identity: Identity) -> None:
        self.identity = identity
        self._fd, self._path_in_errors = fd, PathInErrors(path)
        self._size = self._writeback_begun = 0

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

    def is_linkable_for(self, identity: Identity) -> bool:
        """Whether the file may be linked or moved, and has that owner."""
        return self._is_linkable() and (identity.uid, identity.gid) == (self.identity.uid, self.identity.gid)

    def hide(self) -> None:
        """Lets no other process open the file any more, and this one only copy it."""
        raise NotImplementedError

    def sync(self) -> None:
        """Makes the octets durable where the file is linked or moved next, as soon as that directory is synced."""
        raise NotImplementedError

    def link(self, directory: int, name: str) -> None:
        """Gives the file another name, in the directory with this descriptor."""
        raise NotImplementedError

    def move(self, directory: int, name: str) -> None:
        """Gives the file its last name, in the directory with this descriptor."""
        raise NotImplementedError

    def discard(self) -> None:
        """Closes the file, and removes it unless it has been linked or moved."""
        close_synced(self._fd)

    def _is_linkable(self) -> bool:
        raise NotImplementedError


class NamedDraft(Draft):
    """A draft that has a name in the tmp/. It becomes durable on every file system, by two commits of a journal."""

    def __init__(self, directory: int, path: str, identity: Identity) -> None:
        """directory: a descriptor of the tmp/, which is closed with the draft. path: of the tmp/, for errors."""
        self._directory = directory
        try:
            try:
                fd = self._make(path)
            except FileExistsError:  # a file system of several hosts has made it twice
                fd = self._make(path)
        except BaseException:
            os.close(directory)
            raise
        super().__init__(fd, f"{path}/{self._name}", identity)

    def _make(self, path: str) -> int:
        self._name = unique_name()
        with PathInErrors(f"{path}/{self._name}"):
            return os.open(self._name, NEW_FILE, 0o666, dir_fd=self._directory)

    def hide(self) -> None:
        """Removes the name."""
        with self._path_in_errors:
            os.unlink(self._name, dir_fd=self._directory)
        self._name = ""

    def sync(self) -> None:
        """Makes the octets durable."""
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
        """Closes the file, and removes its name unless it has been moved."""
        try:
            if self._name:
                with self.identity, self._path_in_errors:
                    os.unlink(self._name, dir_fd=self._directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("draft-left-behind", file=self._name, cause=error)
        super().discard()
        close_synced(self._directory)

    def _is_linkable(self) -> bool:
        return bool(self._name)


class UnnamedDraft(Draft):
    """A draft without a name (O_TMPFILE), which becomes durable by one commit of the journal, see works_in().

    sync() waits until the octets are on the device. The link comes after them, so the journal has it after all that
    they need: the file's size and blocks. The sync of the directory commits the journal up to the link, and flushes
    the cache of the device. After a crash there is the whole file, or none. Source: open(2), ioctl_fiemap(2).
    """

    _works_on: ClassVar[dict[int, bool]] = {}  # by the number of the file system

    def __init__(self, path: str, guarded: bool, identity: Identity) -> None:
        """path: of the tmp/. guarded: see open_directory()."""
        with PathInErrors(path):
            if guarded:
                directory = open_directory(path, guarded)
                try:
                    fd = os.open(".", NEW_UNNAMED_FILE, 0o666, dir_fd=directory)
                finally:
                    close_synced(directory)
            else:
                fd = os.open(path, NEW_UNNAMED_FILE, 0o666)
        super().__init__(fd, path, identity)
        self._is_hidden = False

    @classmethod
    def works_in(cls, path: str, guarded: bool, device: int) -> bool:
        """Whether such drafts become durable in that tmp/, on the file system with that number."""
        works = cls._works_on.get(device)
        if works is None:
            try:
                works = cls._works_on[device] = has_ordered_journal(device, lambda: cls._sync_another(path, guarded))
            except OSError:
                return False  # it may work in another tmp/
        return works

    @classmethod
    def _sync_another(cls, path: str, guarded: bool) -> None:
        draft = cls(path, guarded, Identity.of_process())
        try:
            os.fsync(draft._fd)
        finally:
            draft.discard()

    @classmethod
    def give_up_on(cls, device: int) -> None:
        """After an error there: uses drafts with names from now on, which need less of the system."""
        cls._works_on[device] = False

    def hide(self) -> None:
        """There is no name to remove."""
        self._is_hidden = True

    def sync(self) -> None:
        """Waits until the octets are on the device."""
        with self._path_in_errors:
            try:
                write_data(self._fd)
            except OSError:
                self.give_up_on(self.device())
                os.fsync(self._fd)  # raises the error again if it is one of the device

    def link(self, directory: int, name: str) -> None:
        """Gives the file a name, in the directory with this descriptor."""
        try:
            os.link(f"/proc/self/fd/{self._fd}", name, dst_dir_fd=directory, follow_symlinks=True)
        except OSError as error:
            if error.errno not in THIS_LINK_ONLY:
                self.give_up_on(self.device())
            raise

    move = link

    def _is_linkable(self) -> bool:
        return not self._is_hidden


def has_ordered_journal(device: int, sync_change: Callable[[], None]) -> bool:
    """Whether a file system puts all changes into one journal, in their order, and flushes its device with it.

    That is known of XFS and ext4 with the journal on the device that has the data, but not of ext4 with fast commits.
    ext4 counts these; that it has none says something only after a sync. device: the number of the file system.
    sync_change: makes a change there, and syncs it. Raises the OSError of sync_change.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    file_system, options = mount_of(number)
    if linux_version() < ONE_COMMIT_LINUX or file_system not in ("ext4", "xfs"):
        return False
    if file_system == "xfs":
        return not any(option.startswith(("logdev=", "rtdev=")) for option in options)
    name = name_of_device(number)
    if ORDERED_MODES.isdisjoint(system_file(f"/proc/fs/ext4/{name}/options").split()):
        return False
    if not os.path.isdir(f"/proc/fs/jbd2/{name}-8"):
        return False
    sync_change()
    return NO_FAST_COMMITS in system_file(f"/proc/fs/ext4/{name}/fc_info")


def shared_file_system(path: str) -> str:
    """The type of the file system with that path if other hosts may use it, too; "" if it is local, or unknown."""
    try:
        device = os.stat(path).st_dev
    except OSError:
        return ""
    if os.major(device):  # a block device, or a part of one
        return ""
    name, _ = mount_of(f"0:{os.minor(device)}")
    return name if name in SHARED_FILE_SYSTEMS or name.startswith("fuse.") else ""


def name_of_device(number: str) -> str:
    """The kernel's name of the block device with that number, "major:minor"; "" if it cannot be found out."""
    try:
        return os.path.basename(os.readlink(f"/sys/dev/block/{number}"))
    except OSError:
        return ""


def system_file(file: str) -> bytes:
    """What is in a file of the system; b"" if it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def linux_version() -> tuple[int, int]:
    """The first two numbers of the kernel's version; (0, 0) if it has another form."""
    numbers = os.uname().release.replace("+", ".").replace("-", ".").split(".")[:2]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and "".join(numbers).isdecimal() else (0, 0)


def mount_of(number: str) -> tuple[str, list[str]]:
    """The type and the options of the file system with that number, "major:minor"; "" if unknown. Source: proc(5)."""
    for line in system_file("/proc/self/mountinfo").decode(errors="replace").split("\n"):
        mount, _, file_system = line.partition(" - ")
        if mount.split(" ")[2:3] == [number]:
            name, _, options = file_system.split(" ")[:3]  # the source, between them, may be empty
            return name, options.split(",")
    return "", []


def write_data(fd: int) -> None:
    """Writes the data of a file to its device, and waits until they are there; the cache of the device may have them.

    Does what sync_file_range(2) does, which Python lacks: before the extents of a file are counted, FIEMAP_FLAG_SYNC
    writes all of its data. Raises OSError. Source: ioctl_fiemap(2).
    """
    from fcntl import ioctl

    ioctl(fd, FS_IOC_FIEMAP, COUNT_WRITTEN_EXTENTS)


def unless_replaced(use: Callable[[], T], errors: Sequence[int]) -> T:
    """Calls use(), and again after one of these errors: another host has replaced the file. Raises OSError."""
    for _ in range(FILE_TRIES - 1):
        try:
            return use()
        except OSError as error:
            if error.errno not in errors:
                raise
            if error.errno == errno.ESTALE:
                time.sleep(STALE_PAUSE)
    return use()


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
        path = self.path_of(tmp)
        try:
            device = os.stat(path).st_dev
        except FileNotFoundError:
            self.make(tmp)
            device = os.stat(path).st_dev
        if UnnamedDraft.works_in(path, self.guarded, device):
            try:
                return UnnamedDraft(path, self.guarded, self._identity)
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    UnnamedDraft.give_up_on(device)
        return NamedDraft(self.open(tmp), path, self._identity)

    def subdirectories(self) -> list[str]:
        """The names of all directories in it."""
        fd = self.open("")
        try:
            with PathInErrors(self.path), os.scandir(fd) as entries:
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
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
            except BaseException:
                os.close(fd)
                raise
        return fd

    def read_file(self, directory: str, name: str, limit: int) -> tuple[bytes, float]:
        """The first octets of a regular file in a directory below, and the seconds since it was written."""

        def read() -> tuple[bytes, float]:
            fd = self.open_file(directory, name, os.O_RDONLY)
            try:
                return os.read(fd, limit), time.time() - os.fstat(fd).st_mtime
            finally:
                os.close(fd)

        return unless_replaced(read, [errno.ESTALE])

    def append_to_file(self, directory: str, name: str, content: bytes) -> bool:
        """Appends to a regular file in a directory below, again if the file has been replaced meanwhile.

        False if it has been replaced each time, so that it does not have the content.
        """

        def append() -> bool:
            with PathInErrors(f"{self.path_of(directory)}/{name}"):
                fd = self.open_file(directory, name, os.O_WRONLY | os.O_APPEND)
                try:
                    write_all(fd, content)
                    written = os.fstat(fd)
                finally:
                    os.close(fd)  # other hosts may see it only now
                fd = self.open_file(directory, name, os.O_RDONLY)
                try:
                    return written.st_nlink > 0 and os.path.samestat(os.fstat(fd), written)
                finally:
                    close_synced(fd)

        # While another host replaces a file, some file systems have none of that name.
        return any(unless_replaced(append, [errno.ESTALE, errno.ENOENT]) for _ in range(FILE_TRIES))

    def add_file(self, directory: str, name: str, content: bytes) -> None:
        """Makes a file in a directory below, all at once, unless the name is taken. Only its content is synced."""

        def link(draft: NamedDraft, place: int) -> None:
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

        def move(draft: NamedDraft, place: int) -> None:
            draft.make_newer_than(newer_than)
            draft.move(place, name)

        self._put_file(directory, content, move)

    def _put_file(self, directory: str, content: bytes, put: Callable[[NamedDraft, int], None]) -> None:
        """Calls put() with a synced draft of the content and a descriptor of the directory, which is not synced."""
        tmp = f"{directory}/tmp"
        draft = NamedDraft(self.open_or_make(tmp), self.path_of(tmp), self._identity)
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
    """A name that no other message has or will have: time, process, random number, count, host.

    The random number differs where the others do not: if the clock is set back and a process id comes again, or if two
    hosts have one name. Source: maildir(5), and D. J. Bernstein's text on the format.
    """
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    process = os.getpid()
    if process not in RANDOM_NUMBERS:
        RANDOM_NUMBERS[process] = os.urandom(6).hex()
    return f"{seconds}.M{microseconds:06d}P{process}R{RANDOM_NUMBERS[process]}Q{next(NAMES_MADE)}.{HOST}"


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

NUL_IN_MESSAGE = Reply(554, "5.6.0", "The message contains a NUL byte")
EIGHT_BIT_HEADER = Reply(554, "5.6.0", "The message has non-ASCII bytes in its header")
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

    def without_last_field(self) -> Header:
        """The header without its last field, of which not all may have arrived."""
        end = len(self.octets)
        while (end := self.octets.rfind(LF, 0, end)) >= 0:
            if self.octets[end + 1 : end + 2] not in (b"", b" ", b"\t"):
                break
        return Header(self.octets[: end + 1])

    def body_of(self, name: bytes) -> str | None:
        """The body of the first field of that name, with single spaces; None if it is missing."""
        for start, end in self.spans(name):
            body = self.octets[start:end].partition(b":")[2]
            return b" ".join(body.split()).decode("utf-8", "backslashreplace")
        return None

    def with_field(self, field: bytes) -> Header:
        """The header with a field after the first one, Return-Path. field: with the LF at its end."""
        start = self.octets.index(LF) + 1
        return Header(self.octets[:start] + field + self.octets[start:])

    def without(self, name: bytes) -> bytes:
        """The octets without the fields of that name."""
        kept, after = [], 0
        for start, end in self.spans(name):
            kept.append(self.octets[after:start])
            after = end
        return b"".join([*kept, self.octets[after:]])

    def name_with(self, prefix: bytes) -> str:
        """The name of the first field whose name begins so; "" if there is none."""
        self._lowered = self._lowered or LF + self.octets.lower()
        start = self._lowered.find(LF + prefix)
        return self.octets[start:].partition(b":")[0].decode("ascii", "replace") if start >= 0 else ""

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


def is_field_name(name: str) -> bool:
    """Whether a header field can have that name (RFC 5322 section 2.2)."""
    return bool(name) and name.isascii() and FIELD_NAME.issuperset(name.encode())


class Message:
    """A message as it is stored: in memory while it is small, else in a draft.

    header: the header section, with the added fields, as far as it lies in the first MEMORY_LIMIT octets. body_offset:
    the index after it and the empty line. size: octets. lines: LFs without a CR, to which an IMAP server adds one.
    message_id: the Message-ID as text. has_message_id: whether the client sent it. date: the Date that the client sent.
    content: all octets; b"" if they are not in memory. draft: a file with all octets; None while there is none. added:
    the octets of the fields that this host has put before those of the client.
    """

    __slots__ = (
        *("_original", "added", "body_offset", "content", "date", "draft", "has_message_id", "header", "lines"),
        *("message_id", "size"),
    )

    def __init__(self) -> None:
        self.header = NO_HEADER
        self.added = self.body_offset = self.size = self.lines = 0
        self.message_id, self.has_message_id, self.date = "", False, ""
        self.content = b""
        self.draft: Draft | None = None
        self._original: Message | None = None  # for a variant: what has the octets after its header

    @classmethod
    def of(cls, content: bytes) -> Message:
        """The message with these octets, which have LF at the end of lines."""
        message = cls()
        message.content, message.header = content, Header.of(content)
        message.size, message.lines = len(content), line_ends(content)
        message.body_offset = min(len(message.header.octets) + 1, len(content)) if message.header.octets else 0
        return message

    def with_header(self, header: Header) -> Message:
        """A variant with another header. It reads this message, and has no draft yet."""
        variant = Message()
        variant._original, variant.header = self, header
        more = len(header.octets) - len(self.header.octets)
        variant.body_offset, variant.size = self.body_offset + more, self.size + more
        variant.lines = self.lines + line_ends(header.octets) - line_ends(self.header.octets)
        variant.message_id, variant.has_message_id, variant.date = self.message_id, self.has_message_id, self.date
        return variant

    def read(self, offset: int, size: int) -> bytes:
        """The octets from that offset on, size at most; b"" at the end. Raises OSError."""
        if self._original:
            beginning = self.header.octets[offset : offset + size]
            if len(beginning) == size:
                return beginning
            start = offset + len(beginning) - self.size + self._original.size
            return beginning + self._original.read(start, size - len(beginning))
        if self.content or not self.draft:
            return self.content[offset : offset + size]
        return self.draft.read(offset, size)

    def fingerprint(self) -> str:
        """A hash of the message as the client sent it, by which it is known when it comes again. Raises OSError."""
        import hashlib

        digest = hashlib.sha256()
        for piece in self.stream(self.added):
            digest.update(piece)
        return digest.hexdigest()

    def stream(self, offset: int = 0) -> Iterator[bytes]:
        """The octets from that offset on, READ_SIZE at a time. Raises OSError."""
        while piece := self.read(offset, READ_SIZE):
            yield piece
            offset += len(piece)

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
                log.warning("spooling-elsewhere", cause=error)
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
        message.content = content = self._with_added_fields(is_complete=True)
        message.size, message.lines = len(content), line_ends(content)

    def discard(self) -> None:
        """Frees the octets, and removes the draft if it has not become a delivered message."""
        self._received.clear()
        self.message.discard()

    def _refuse(self, reply: Reply) -> None:
        self.refusal = reply
        self.discard()

    def _fail(self, error: OSError) -> None:
        log.error("spooling-failed", cause=error)
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

    def _with_added_fields(self, is_complete: bool = False) -> bytes:
        """The octets received so far, with the trace and missing fields before them; b"" if they are refused."""
        received = bytes(self._received)
        self._received.clear()
        header = Header.of(received)
        is_cut = len(header.octets) == len(received) and not is_complete
        if is_cut:
            header = header.without_last_field()
        body = received[len(header.octets) :]
        if not header.octets.isascii():
            if self._config.reject8bit:
                self._refuse(EIGHT_BIT_HEADER)
                return b""
            if self._config.munge8bit:
                header = Header(header.octets.translate(EIGHT_BIT_TO_X))
        message = self.message
        head = [self._trace, *self._added_fields(header)]
        message.added = sum(map(len, head))
        head.append(header.without(b"return-path"))
        if body and not header.octets and not body.startswith(LF):
            body = LF + body
        message.header = Header(b"".join(head))
        message.body_offset = len(message.header.octets)
        if not is_cut:
            message.body_offset += 1 if body.startswith(LF) else 2 if body else 0
        return message.header.octets + body

    def _added_fields(self, header: Header) -> list[bytes]:
        """The fields Message-ID and Date, as far as the header does not have them. Sets both in the message."""
        message, missing = self.message, []
        if (message_id := header.body_of(b"message-id")) is not None:
            message.message_id, message.has_message_id = message_id, True
        else:
            message.message_id = new_message_id(self._config)
            missing.append(f"Message-ID: {message.message_id}\n".encode())
        if (date := header.body_of(b"date")) is not None:
            message.date = date
        else:
            missing.append(f"Date: {date_time()}\n".encode())
        return missing


def count_of_lf(data: bytes) -> int:
    """data.count(LF), in a sixth of the time."""
    return len(data) - len(data.replace(LF, b""))


def line_ends(data: bytes) -> int:
    """The number of LFs without a CR before them."""
    return count_of_lf(data) - data.count(CRLF)


def date_time() -> str:
    """The time now, as RFC 5322 section 3.3 writes it."""
    return time.strftime("%a, %d %b %Y %H:%M:%S %z")  # in English: this program never sets a locale


def new_message_id(config: Config) -> str:
    """A Message-ID for a message that has none."""
    return f"<lmtpd.{time.time_ns()}.{os.getpid()}@{config.servername}>"


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
CODE_DIGITS = frozenset(DIGITS + "abcdefABCDEF")
FIELD_LINE = 78  # characters of a line of a header field that is added
WORD_LIMIT = 900  # characters of a word without spaces; a line may have 998, RFC 5322 section 2.1.1
NOT_IN_FIELDS = dict.fromkeys((*range(9), *range(10, 32), 127), " ")  # control characters
ENCODED_WORD = 45  # octets in an encoded word, whose length RFC 2047 section 2 limits to 75 characters


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


def folded_field(name: str, value: str) -> bytes:
    """A field with that name and value, folded (RFC 5322 section 2.2.3), encoded where it has to be (RFC 2047)."""
    lines: list[str] = []
    line = f"{name}:"
    for word in encoded_if_needed(value).split(" "):
        if len(line) + len(word) >= FIELD_LINE and line.strip() and (lines or line != f"{name}:"):
            lines.append(line)
            line = ""
        line += f" {word}"
    return ("\n".join([*lines, line]) + "\n").encode("utf-8", "surrogateescape")


def encoded_if_needed(value: str) -> str:
    """Text for a header field, in one line; in encoded words if ASCII or short words are not enough (RFC 2047)."""
    value = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    value = value.replace("\r\n", " ").translate(NOT_IN_FIELDS).strip()
    if value.isascii() and all(len(word) < WORD_LIMIT for word in value.split(" ")):
        return value
    from binascii import b2a_base64

    words, piece = [], b""
    for character in f"{value}\0":
        octets = character.encode("utf-8", "surrogateescape")
        if character == "\0" or len(piece) + len(octets) > ENCODED_WORD:
            words.append(f"=?UTF-8?B?{b2a_base64(piece, newline=False).decode()}?=")
            piece = b""
        piece += octets
    return " ".join(words)


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
        if not self._window or self.position > self._window_start + len(self._window):  # a header may go on after it
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
            self._move_to(max(self.position, offset + len(window) - len(self._needle) + 1))
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
        lines = [line.rstrip(b" \t") if line[-1:] != b"\r" else line[:-1].rstrip(b" \t") + b"\r" for line in lines]
        octets = LF.join([*lines, last])
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
FLAG_LETTERS = {r"\draft": "D", r"\flagged": "F", r"\answered": "R", r"\seen": "S", r"\deleted": "T"}
KEYWORD_ATOM = frozenset(map(chr, range(33, 127))) - frozenset('(){%*"\\]')  # RFC 3501 section 9, flag-keyword
KEYWORD_LETTERS = "abcdefghijklmnopqrstuvwxyz"
FOREIGN_DIGITS = 10  # digits of a number in a file that others write
EMPTY_LOCK_STALE = 60  # seconds; its process was killed before it could write its number
LOCK_PATIENCE, LOCK_STALE = 30, 120  # seconds to wait for a lock; the age at which a lock is stale


def folder_parts(name: str, config: Config) -> tuple[str, ...]:
    """The levels of a folder's name as people write it; () for the INBOX. A slash too many is none.

    Raises ValueError for a name that no folder can have.
    """
    if name.upper() == "INBOX":
        return ()
    if len(name) > NAME_LIMIT:
        raise ValueError(f"{name[:NAME_LIMIT]!r}... is too long for a folder's name")
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


def folder_name(folder: str) -> str:
    """The name of a folder as people write it, with slashes between its levels."""
    return "/".join(from_modified_utf7(part) for part in folder.split(".")[1:]) or "INBOX"


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
    """Octets and messages for the log, such as "1000 bytes, 10 messages"; without zeros."""
    return ", ".join(f"{number} {unit}" for number, unit in zip(amount, ("bytes", "messages")) if number)


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
            content, age = self._directory.read_file(INBOX, QUOTA_FILE, QUOTA_FILE_LIMIT)
        except FileNotFoundError:
            limits = self._limits or self._default
            self._no_quota = not any(limits)
            return None if self._no_quota else self.recount(limits)
        try:
            usage = QuotaUsage.parse(content, age)
        except ValueError:
            return self.recount(self._limits or self._limits_in(content))
        if self._limits and usage.limits != self._limits:
            return self.recount(self._limits)
        return usage

    def add(self, octets: int, messages: int) -> None:
        """Adds to the usage, if there is a quota. If that fails, the next reader of the file counts anew."""
        if not self._no_quota:
            self._append(f"{octets} {messages}\n".encode())

    def recount(self, limits: tuple[int, int]) -> QuotaUsage | None:
        """Counts all messages and replaces the file, again if the Maildir has changed meanwhile.

        None while another process counts them.
        """
        if self._config.read_only:
            return self._count(limits, self._counted_directories())
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

    def _append(self, lines: bytes) -> None:
        """Appends to the file. If that fails, the next reader of it counts anew."""
        try:
            if not self._directory.append_to_file(INBOX, QUOTA_FILE, lines):
                self._invalidate()
        except FileNotFoundError:
            return  # there is no quota
        except OSError:
            self._invalidate()
            raise

    def _invalidate(self) -> None:
        """Makes the usage in the file unreadable but keeps the limits, which may stand nowhere else.

        One octet is overwritten in place: that takes no space on a full disk.
        """
        fd = unless_replaced(lambda: self._directory.open_file(INBOX, QUOTA_FILE, os.O_RDWR), [errno.ESTALE])
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
            log.warning("quota-lost", mailbox=self._directory.path, cause=error)
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
        usage = self._count(limits, directories)
        self._directory.replace_file(INBOX, QUOTA_FILE, usage.render())
        refresh_attributes(old)
        lines = os.pread(old, READ_SIZE, start).splitlines(keepends=True)
        if additions := b"".join(line for line in lines if b"-" not in line):
            self._append(additions)
        return usage

    def _count(self, limits: tuple[int, int], directories: Iterable[str]) -> QuotaUsage:
        octets = messages = 0
        for directory in directories:
            for size in self._sizes_in(directory):
                octets, messages = octets + size, messages + 1
        return QuotaUsage(limits, (octets, messages), doubtful=False)

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
            try:
                changed[directory] = os.fstat(fd).st_mtime_ns
            finally:
                close_synced(fd)
        return changed

    def _sizes_in(self, directory: str) -> Iterator[int]:
        """The octets of each message in the directory that counts in the quota."""
        fd = self._directory.open(directory)
        try:
            with PathInErrors(self._directory.path_of(directory)), os.scandir(fd) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or (self._excludes_deleted and is_deleted(entry.name)):
                        continue
                    try:
                        yield size_of(entry)
                    except FileNotFoundError:
                        continue  # it has been removed or renamed meanwhile
        finally:
            os.close(fd)


def refresh_attributes(fd: int) -> None:
    """Makes the system ask the file server for the size of a file. The size in its cache may be a second old."""
    try:
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode))  # a change makes it ask
    except OSError:
        return


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
        left_out = []
        for keyword in keywords:
            if keyword.lower() in known:
                continue
            if not unused:
                left_out.append(keyword)
                continue
            known[keyword.lower()] = unused.pop(0), keyword
        if left_out:
            folder = self._directory.path_of(self._folder)
            log.warning("no-letter-for-keyword", keyword=" ".join(left_out), mailbox=folder)
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
        short = [(number, name) for number, _, name in lines if name and 0 < len(number) <= FOREIGN_DIGITS]
        numbered = [(int(number), name) for number, name in short if DECIMAL.issuperset(number)]
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
            if self._is_held():
                os.unlink(self._name, dir_fd=self._place)
        finally:
            close_synced(self._place)

    def _is_held(self) -> bool:
        """Whether the lock file is still this process's: another one may have taken a stale lock away."""
        try:
            return self._holder(self._name)[:2] == (str(os.getpid()), socket.gethostname())
        except OSError:
            return True  # most likely; and a lock that is left behind would make others wait

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
                except BaseException:
                    os.unlink(self._name, dir_fd=self._place)
                    raise
                finally:
                    close_synced(fd)
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
        if age > (LOCK_STALE if process else EMPTY_LOCK_STALE):
            return True
        is_number = 0 < len(process) <= FOREIGN_DIGITS and DECIMAL.issuperset(process)
        return is_number and host == socket.gethostname() and has_ended(int(process))

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
                log.warning("stale-lock-removed", mailbox=self._directory.path_of(self._folder), process=process)
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
            log.error("copy-left-behind", mailbox=self._mailbox.path, file=self.name, cause=error)
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
        self._subscriptions, self._can_subscribe = SubscriptionFiles(directory), True
        self._seen: set[str] = set()
        self._by_similar_name: dict[tuple[str, ...], list[str]] | None = None

    def exists(self, folder: str) -> bool:
        """Whether the folder exists, or has existed a moment ago."""
        if folder in self._seen:
            return True
        with self._identity:
            try:
                os.close(self._directory.open(f"{folder}/cur"))
            except OSError as error:
                if error.errno in (*ABSENT, errno.ELOOP):  # ELOOP: a link that is not followed
                    return False
                raise
        self._seen.add(folder)
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

    def make(self, folder: str, subscribes: bool = False) -> None:
        """Makes the folder, durably. subscribes: whether the user is subscribed to it in any case."""
        self._directory.make(folder)
        self._directory.add_file(folder, "maildirfolder", b"")
        for name in ("tmp", "new"):
            self._directory.make(f"{folder}/{name}")
        if self._can_subscribe and (subscribes or self._config.lmtp_autosubscribe):
            try:
                self._subscriptions.add(folder)
            except OSError as error:
                log.warning("not-subscribed", mailbox=self._directory.path_of(folder), cause=error)
                self._can_subscribe = False  # mail need not wait for the same again
        # Last, for exists() looks for it: if something fails, the next try makes the rest.
        self._directory.make(f"{folder}/cur")
        if self._by_similar_name is not None:
            self._by_similar_name.setdefault(similar_name(folder), []).append(folder)

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
    limits: the octets and messages that it may have; None if its file maildirsize gives them. script: the path of its
    owner's Sieve script, existing or not; "" for none. A folder is the name of its directory, as resolve() and
    new_folder() give it; INBOX is the Maildir itself.
    """

    def __init__(
        self,
        path: str,
        identity: Identity,
        config: Config,
        missing: bool = False,
        limits: tuple[int, int] | None = None,
        script: str = "",
    ) -> None:
        self.path, self.identity, self.script = path, identity, script
        self.owner = identity.uid, identity.gid
        self._config, self._missing = config, missing
        self._directory = Directory(path, identity)
        self.quota = QuotaFile(self._directory, limits, config)
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
            self.quota.create()
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
        if self._missing or not self.quota.includes(folder, ""):
            return
        try:
            with self.identity:
                usage = self.quota.usage()
                if usage and usage.doubtful and not usage.has_room_for(octets, messages):
                    usage = self.quota.recount(usage.limits)
        except OSError as error:
            log.warning("quota-unknown", mailbox=self.path, cause=error)
            return
        if usage and not usage.has_room_for(octets, messages):
            raise MailboxFull(self.path, in_words(usage.used), in_words(usage.limits))

    def charge(self, octets: int, messages: int) -> None:
        """Adds to the usage of the quota, if there is one."""
        if not messages:
            return
        try:
            with self.identity:
                self.quota.add(octets, messages)
        except Exception as error:  # the message is there
            log.warning("quota-unknown", mailbox=self.path, cause=error)

    def place(
        self,
        message: Message,
        folder: str = INBOX,
        flags: Sequence[str] = (),
        may_move: bool = True,
        subscribes: bool = False,
    ) -> Placed:
        """Puts the message into the folder, with these flags and keywords. The caller syncs and closes the result.

        A missing folder is made, and if subscribes is set the owner subscribed to it. The first placement sets
        message.draft, which later ones link. may_move: whether this is the last placement, so that the draft may be
        moved. Where neither is possible, or singleinstancestore is off, the octets are copied. Raises OSError, and
        ValueError for a flag that does not exist; nothing is left then where readers can see it.
        """
        self.make()
        with self.identity:
            if not message.draft:
                message.draft = self._finished_draft(message)
            if folder != INBOX and not self._folders.exists(folder):
                self._folders.make(folder, subscribes)
            place, info = self._target(folder, flags)
            name = f"{unique_name()},S={message.size},W={message.size + message.lines}{info}"
            directory = self._directory.open_or_make(place)
            path = f"{self._directory.path_of(place)}/{name}"
            try:
                with PathInErrors(path):
                    if not self._move_or_link(message.draft, directory, name, may_move):
                        self._copy(message, directory, name)
            except BaseException:
                os.close(directory)
                raise
            size, number = (message.size, 1) if self.quota.includes(folder, info) else (0, 0)
            self.charge(size, number)
        return Placed(self, directory, path, size, number)

    def _target(self, folder: str, flags: Sequence[str]) -> tuple[str, str]:
        """The directory for a message with these flags, and the end of its name. Raises OSError and ValueError."""
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
        except BaseException:
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
    home, path: the home directory and the Maildir; "" if the database does not say. script: the path of the Sieve
    script, "" for none; None if the database does not say. limits: the octets and messages that the Maildir may have;
    None if the database does not say.
    """

    def __init__(
        self,
        userid: str,
        identity: Identity,
        known: bool = True,
        home: str = "",
        path: str = "",
        limits: tuple[int, int] | None = None,
        script: str | None = None,
    ) -> None:
        self.userid, self.identity, self.known = userid, identity, known
        self.home, self.path, self.limits, self.script = home, path, limits, script


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
            check_look_up("getpwnam_r", userid)
            raise UserUnknown from None
        if entry.pw_uid < max(self._min_uid, 1) or entry.pw_uid == NOBODY:
            raise UserUnknown
        groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
        return Account(entry.pw_name, Identity(entry.pw_uid, entry.pw_gid, groups), home=entry.pw_dir)


def is_in_group(user: str, group: str) -> bool:
    """Whether the user is a member of the group, see group(5), or has it as primary group. Raises StoreUnavailable."""
    import grp
    import pwd

    try:
        entry = grp.getgrnam(group)
    except KeyError:
        check_look_up("getgrnam_r", group)
        return False
    try:
        return user in entry.gr_mem or pwd.getpwnam(user).pw_gid == entry.gr_gid
    except KeyError:
        check_look_up("getpwnam_r", user)
        return False


def check_look_up(call: str, name: str) -> None:
    """Raises StoreUnavailable if a look-up that has found nothing has failed: the modules pwd and grp do not tell."""
    if error := look_up_error(call, name):
        log.error("user-database-unavailable", user=name, cause=os.strerror(error))
        raise StoreUnavailable


def look_up_error(call: str, name: str) -> int:
    """The errno of a look-up that has just found nothing, by the same call; 0 if it has not failed.

    If the name is found now, the look-up before has failed. Source: getpwnam_r(3), getgrnam_r(3).
    """
    try:
        import ctypes

        entry, strings = ctypes.create_string_buffer(PASSWD_SIZE), ctypes.create_string_buffer(READ_SIZE)
    except (ImportError, OSError, MemoryError):  # no descriptor is left, so the look-up has failed, too
        return errno.EMFILE
    result = ctypes.c_void_p()
    error: int = ctypes.CDLL(None)[call](
        name.encode(), entry, strings, ctypes.c_size_t(len(strings)), ctypes.byref(result)
    )
    return error or (errno.EAGAIN if result.value else 0)


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
            log.error("user-database-unavailable", user=userid, cause=error)
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
        script = script_in_dovecot_fields(fields, home)
        return Account(userid, Identity(uid, gid, groups), home=home, path=path, limits=limits, script=script)

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
                    self._version = as_number("".join(words[-1:]))
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


def script_in_dovecot_fields(fields: dict[str, str], home: str) -> str | None:
    """The path of the user's active Sieve script by the field sieve; "" if it is no file, None without the field.

    Without a setting "active", a path that ends in ".sieve" is the script; another one is the folder of all scripts,
    of which ~/.dovecot.sieve is the active one. Source: Pigeonhole's documentation of its setting sieve.
    """
    location, *settings = fields.get("sieve", "").split(";")
    if not location:
        return None
    path = location.removeprefix("file:")
    if ":" in path.partition("/")[0]:
        log.warning_once("script-location-unknown", field=f"sieve={fields['sieve']}", cause="it must be a file")
        return ""
    active = [setting.removeprefix("active=") for setting in settings if setting.startswith("active=")]
    path = active[0] if active else path if path.endswith(".sieve") else "~/.dovecot.sieve"
    if path.startswith("/"):
        return path
    return f"{home}/{path.removeprefix('~/')}" if home else ""


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
    mailbox.script                      The path of its owner's Sieve script; "" for none.
    mailbox.identity                    Whose rights are needed to read that.
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
    mailbox.place(message, folder, flags, may_move, subscribes) -> placed
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
        if config.userdb == "maildir" and "h" in template_variables(config.sieve_script):
            raise ConfigError("sieve_script: %h needs userdb: passwd or dovecot")
        check_folder_names(config)
        self._config = config
        self._identity = Identity.of_process()
        self._users: MaildirUsers | PasswdUsers | DovecotUsers = MaildirUsers()
        if config.userdb == "passwd":
            self._users = PasswdUsers(config.passwd_min_uid)
        elif config.userdb == "dovecot":
            backoff = Backoff("" if config.read_only else f"{config.configdirectory}/userdb.backoff")
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
        script = self._script_of(account, recipient)
        return Maildir(path, account.identity, self._config, missing, account.limits, script)

    def shared(self) -> Maildir | None:
        """The Maildir of the shared folders; None if the configuration names none."""
        path = self._config.shared_maildir
        return Maildir(path, self._identity, self._config) if path else None

    def _path_of(self, account: Account, recipient: Recipient) -> str:
        """The path of the recipient's Maildir by the option maildir_path. Raises UserUnknown and StoreUnavailable."""
        if "h" in self._variables and not is_home(account.home):
            raise self._inaccessible(recipient.userid, "the user's home directory is missing, relative or /")
        names = self._names_of(account, recipient)
        path = expand(self._config.maildir_path, {**names, "h": account.home, "p": self._config.partition})
        used = [name for variable, name in names.items() if variable in self._variables]
        if not all(map(is_safe_name, used)) or max(map(len, os.fsencode(path).split(b"/"))) > NAME_LIMIT:
            if account.known:
                raise self._inaccessible(path, "the user database has a name that no directory can have")
            raise UserUnknown
        return path

    def _script_of(self, account: Account, recipient: Recipient) -> str:
        """The path of the recipient's Sieve script; "" if there can be none."""
        config, home = self._config, account.home if is_home(account.home) else ""
        if account.script is not None:
            return account.script
        names = self._names_of(account, recipient)
        if template := config.sieve_script:
            variables = template_variables(template)
            values = {**names, "h": home, "p": config.partition}
            used = [value for variable, value in values.items() if variable in variables and variable not in "hp"]
            is_possible = all(map(is_safe_name, used)) and (home or "h" not in variables)
            return expand(template, values) if is_possible else ""
        if config.sieveusehomedir:
            return f"{home}/.sieve" if home else ""
        if config.sievedir:
            user, _, domain = account.userid.partition("@") if config.virtdomains != "off" else (account.userid, "", "")
            if not is_safe_name(user) or (domain and not is_safe_name(domain)):
                return ""
            above = f"/domain/{cyrus_letter(domain)}/{domain}" if domain else ""
            return f"{config.sievedir}{above}/{cyrus_letter(user)}/{user}/defaultbc"
        return f"{home}/.dovecot.sieve" if home else ""

    def _names_of(self, account: Account, recipient: Recipient) -> dict[str, str]:
        """The values of the variables of templates that name a user, by their letters."""
        user, domain = recipient.user, recipient.domain
        if account.userid != recipient.userid:  # the database has another name for the user
            user, _, domain = account.userid.partition("@")
        return {"u": account.userid, "n": user, "d": domain or self._config.defaultdomain}

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
        log.error("mailbox-not-accessible", mailbox=mailbox, cause=cause)
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


def is_home(path: str) -> bool:
    """Whether it can be the home directory of a user with mail."""
    return path.startswith("/") and bool(path.strip("/"))


def cyrus_letter(name: str) -> str:
    """The directory in which Cyrus has those of the users or domains with that name."""
    letter = name[:1].lower()
    return letter if letter in LETTERS else "q"


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
# Owns the database of what has been done: delivered messages, and what scripts
# remember.
# Must not know what follows from a record.
# ======================================================================

DATABASE_PATIENCE = 5.0  # seconds to wait for the lock of the duplicate database
SENDING_PATIENCE = 60.0  # seconds to wait while another process sends the same mail
LOCK_INTERVAL = 0.01  # seconds between two tries to get a lock
DAY = 86400  # seconds
EXPIRED_AT_ONCE = 10  # expired records that are deleted for each message, besides one for each new record
LONGEST_RECORD = 10 * 366 * DAY  # seconds that a record of a script may last
RECORD_LIMIT = 512  # characters of what a script remembers; of a longer one a hash is kept


class Claim:
    """A message that is about to be delivered to some mailboxes.

    delivered: those that have got it lately. busy: those to which another process delivers it at this moment.
    """

    def __init__(self, message_id: str = "", date: str = "", mailboxes: Sequence[str] = ()) -> None:
        self.message_id, self.date, self.mailboxes = message_id, date, mailboxes
        self.delivered: set[str] = set()
        self.busy: set[str] = set()


class Records:
    """What has been done lately, in a database that all processes share.

    While the database cannot be used, nothing has been done, and the log says why: no method raises, but check().
    name: what the log calls the database.
    """

    def __init__(self, name: str, config: Config) -> None:
        self._name, self._expiry, self._read_only = name, config.duplicate_expiry, config.read_only
        self._backoff = Backoff("" if config.read_only else f"{config.configdirectory}/deliver.backoff")

    def exists(self) -> bool:
        """Whether the database has been made already."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises Unavailable if the database cannot be used."""

    def prepare(self) -> None:
        """Imports what is needed, before workers fork. Raises ImportError and OSError."""
        import hashlib  # noqa: F401

    def claim(self, claim: Claim) -> None:
        """Finds out which of the mailboxes of a claim have the message already. A call of settle() must follow.

        If the database can keep other processes from delivering the message to the others meanwhile, it does.
        """
        raise NotImplementedError

    def settle(self, claim: Claim, mailboxes: Sequence[str]) -> None:
        """Records that a message has been delivered to these mailboxes of its claim; deletes some expired records."""
        raise NotImplementedError

    def has(self, mailbox: str, record: str) -> bool:
        """Whether a script of the mailbox's owner has made the record, and it has not expired."""
        raise NotImplementedError

    def add(self, mailbox: str, records: dict[str, int]) -> None:
        """Makes records that expire after so many seconds, and deletes some expired ones."""
        raise NotImplementedError

    def is_usable(self) -> bool:
        """Whether the database can be written now."""
        raise NotImplementedError

    def lock(self, mailbox: str, record: str) -> AbstractContextManager[None]:
        """A "with" block for what is done at most once for a record: no other process is in one for the same.

        record: "" for no lock.
        """
        raise NotImplementedError

    def _give_up(self, error: Exception) -> None:
        """Logs that the database cannot be used, and starts the back-off."""
        log.error("duplicate-database-unavailable", database=self._name, cause=error)
        self._backoff.start()


class FileRecords(Records):
    """The records in an SQLite database, for the processes of one host. Claims are locks of a file beside it."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        self._path = config.duplicate_db_path or f"{config.configdirectory}/deliver.db"
        super().__init__(self._path, config)
        self._database: Database | None = None
        self._opened: os.stat_result | None = None
        self._locks = FileLocks(f"{self._path}.lock")
        if shared := shared_file_system(os.path.dirname(self._path)):
            raise ConfigError(
                f"{self._path} would be on a file system of type {shared}, where hosts damage an SQLite database: "
                "set duplicate_db_path to a local disk, or duplicate_db: sql"
            )

    def exists(self) -> bool:
        """See Records.exists()."""
        return os.path.exists(self._path)

    def prepare(self) -> None:
        """See Records.prepare()."""
        super().prepare()
        import fcntl  # noqa: F401
        import sqlite3  # noqa: F401
        import zlib  # noqa: F401

    def claim(self, claim: Claim) -> None:
        """See Records.claim()."""
        query = "SELECT 1 FROM deliveries WHERE message_id = ? AND date = ? AND mailbox = ? AND at >= ?"
        since = time.time() - self._expiry
        deadline = time.monotonic() + DATABASE_PATIENCE
        if self._database and not self._is_in_place():
            self._close()
            self._locks.close()
        for mailbox in sorted(claim.mailboxes):
            if self._is_given_up():
                claim.busy.clear()
                return
            if not self._locks.take("\0".join((claim.message_id, claim.date, mailbox)), deadline):
                claim.busy.add(mailbox)
            elif self._execute([(query, (claim.message_id, claim.date, mailbox, since))]):
                claim.delivered.add(mailbox)

    def settle(self, claim: Claim, mailboxes: Sequence[str]) -> None:
        """See Records.settle()."""
        if mailboxes:
            self._add_delivered(claim, mailboxes)
        self._locks.release()

    def _add_delivered(self, claim: Claim, mailboxes: Sequence[str]) -> None:
        now = time.time()
        insert = "INSERT OR REPLACE INTO deliveries (message_id, date, mailbox, at) VALUES (?, ?, ?, ?)"
        # The oldest records have the lowest numbers.
        oldest = "SELECT rowid FROM deliveries ORDER BY rowid LIMIT ?"
        self._execute(
            [
                ("BEGIN IMMEDIATE", ()),
                *((insert, (claim.message_id, claim.date, mailbox, now)) for mailbox in mailboxes),
                (
                    # A time in the future was written while the clock was wrong.
                    f"DELETE FROM deliveries WHERE at NOT BETWEEN ? AND ? AND rowid IN ({oldest})",
                    (now - self._expiry, now + DAY, EXPIRED_AT_ONCE + len(mailboxes)),
                ),
                ("COMMIT", ()),
            ]
        )

    def has(self, mailbox: str, record: str) -> bool:
        """See Records.has()."""
        query = "SELECT 1 FROM script_records WHERE mailbox = ? AND record = ? AND until BETWEEN ? AND ?"
        now = time.time()
        # What lasts longer was written while the clock was wrong.
        return bool(self._execute([(query, (mailbox, record, now, now + LONGEST_RECORD))]))

    def add(self, mailbox: str, records: dict[str, int]) -> None:
        """See Records.add()."""
        now = time.time()
        insert = "INSERT OR REPLACE INTO script_records (mailbox, record, until) VALUES (?, ?, ?)"
        oldest = "SELECT rowid FROM script_records ORDER BY until LIMIT ?"
        self._execute(
            [
                ("BEGIN IMMEDIATE", ()),
                *((insert, (mailbox, record, now + seconds)) for record, seconds in records.items()),
                (
                    f"DELETE FROM script_records WHERE until < ? AND rowid IN ({oldest})",
                    (now, EXPIRED_AT_ONCE + len(records)),
                ),
                ("COMMIT", ()),
            ]
        )

    def is_usable(self) -> bool:
        """See Records.is_usable()."""
        probe = "INSERT OR REPLACE INTO script_records (mailbox, record, until) VALUES ('', '', 0)"
        return bool(self._execute([("BEGIN IMMEDIATE", ()), (probe, ()), ("COMMIT", ()), ("SELECT 1", ())]))

    def lock(self, mailbox: str, record: str) -> RecordLock:
        """See Records.lock()."""
        return RecordLock(self._locks, f"{mailbox}\0{record}" if record else "")

    def _execute(self, statements: Sequence[tuple[str, Sequence[object]]]) -> list[object]:
        """The rows that the last of the statements returns."""
        if self._database and not self._is_in_place():
            self._close()
        if self._is_given_up():
            return []
        try:
            import sqlite3
        except (ImportError, OSError) as error:
            self._give_up(error)
            return []
        try:
            if not self._database:
                self._database, self._opened = self._open(), os.stat(self._path)
            for statement, values in statements:
                rows = self._database.execute(statement, values).fetchall()
            return rows
        except (sqlite3.Error, OSError, MemoryError, ValueError) as error:  # ValueError: a path is not UTF-8
            self._give_up(error)
            self._close()
            return []

    def _open(self) -> Database:
        import sqlite3

        if self._read_only:
            from urllib.parse import quote

            return sqlite3.connect(f"file:{quote(self._path)}?mode=ro", timeout=DATABASE_PATIENCE, uri=True)
        database = sqlite3.connect(self._path, timeout=DATABASE_PATIENCE, isolation_level=None)
        # If the system crashes, a lost record means a second copy, not a lost message.
        database.execute("PRAGMA synchronous = NORMAL")
        deadline = time.monotonic() + DATABASE_PATIENCE
        while not has_table(database, "script_records"):
            try:
                make_tables(database)
            except sqlite3.OperationalError as error:
                # Another process makes the table, and SQLite does not wait for a change of the journal mode.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        return database

    def _is_given_up(self) -> bool:
        return not self._database and self._backoff.is_active()

    def _is_in_place(self) -> bool:
        """Whether the file that has been opened is still there: an administrator may have removed it."""
        try:
            return self._opened is not None and os.path.samestat(self._opened, os.stat(self._path))
        except OSError:
            return False

    def _close(self) -> None:
        import sqlite3

        database, self._database = self._database, None
        try:
            if database:
                database.close()
        except sqlite3.Error:
            return


class FileLocks:
    """Locks that only one process can have, each an octet of a file. They end with the process.

    Source: fcntl_locking(2).
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def take(self, key: str, deadline: float) -> bool:
        """Takes the lock for a key; False if another process has it until the deadline, of time.monotonic().

        True, too, if the file cannot be locked: something may be done twice, but must not be left undone.
        """
        try:
            from fcntl import LOCK_EX, LOCK_NB, lockf
            from zlib import crc32

            place = crc32(key.encode("utf-8", "surrogateescape"))
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            while True:
                try:
                    lockf(self._fd, LOCK_EX | LOCK_NB, 1, place)
                    return True
                except (BlockingIOError, PermissionError):
                    if time.monotonic() > deadline:
                        return False
                    time.sleep(LOCK_INTERVAL)
        except (ImportError, OSError) as error:
            log.warning("record-not-locked", cause=error)
            return True

    def release(self) -> None:
        """Releases all."""
        if self._fd < 0:
            return
        from fcntl import LOCK_UN, lockf

        try:
            lockf(self._fd, LOCK_UN)
        except OSError:
            self.close()

    def close(self) -> None:
        """Releases all, and closes the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_synced(fd)


class RecordLock:
    """See FileRecords.lock()."""

    def __init__(self, locks: FileLocks, key: str) -> None:
        self._locks, self._key = locks, key

    def __enter__(self) -> None:
        if self._key and not self._locks.take(self._key, time.monotonic() + SENDING_PATIENCE):
            log.warning("record-not-locked", cause="another process has the lock")

    def __exit__(self, *_: object) -> None:
        self._locks.release()


def has_table(database: Database, name: str) -> bool:
    """Whether the database has a table of that name. Raises sqlite3.Error."""
    return bool(database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchall())


def make_tables(database: Database) -> None:
    """Makes the tables that are missing. That of version 0.1.0, which had no dates, goes. Raises sqlite3.Error."""
    database.execute("PRAGMA page_size = 1024")  # each record writes two pages
    database.execute("PRAGMA journal_mode = WAL")
    deliveries = "message_id TEXT, date TEXT, mailbox TEXT, at REAL, UNIQUE (message_id, date, mailbox)"
    scripts = "mailbox TEXT, record TEXT, until REAL, UNIQUE (mailbox, record)"
    with database:
        database.execute("BEGIN IMMEDIATE")
        database.execute(f"CREATE TABLE IF NOT EXISTS deliveries ({deliveries})")
        database.execute(f"CREATE TABLE IF NOT EXISTS script_records ({scripts})")
        database.execute("CREATE INDEX IF NOT EXISTS script_records_until ON script_records (until)")
        database.execute("DROP TABLE IF EXISTS delivered")


def shortened(record: str) -> str:
    """What a script remembers, or a hash of it if it is long."""
    text = record.encode("utf-8", "surrogateescape")
    if len(text) <= RECORD_LIMIT:
        return text.decode("utf-8", "backslashreplace")
    import hashlib

    return hashlib.sha256(text).hexdigest()


# ======================================================================
# Shared records
#
# Owns the same in a PostgreSQL database, which several hosts share.
# Must not know what follows from a record.
# ======================================================================

# What ServerRecords asks: SQL, with the times of the server.
BEGIN, COMMIT, ROLLBACK = ("BEGIN", ()), ("COMMIT", ()), ("ROLLBACK", ())
SAVEPOINT, ROLLBACK_TO_SAVEPOINT = ("SAVEPOINT one", ()), ("ROLLBACK TO one", ())
LOCK_TABLE = "LOCK TABLE deliveries IN ROW EXCLUSIVE MODE", ()
BRIEF_LOCKS = "SET LOCAL lock_timeout = '20ms'", ()
TABLES_EXIST = "SELECT 1 WHERE to_regclass('deliveries') IS NOT NULL AND to_regclass('script_records') IS NOT NULL", ()
MAY_MAKE_TABLES = "SELECT 1 WHERE has_schema_privilege(current_schema(), 'CREATE')", ()
DELIVERIES = "key bytea PRIMARY KEY, message_id text, date text, mailbox text, at timestamptz DEFAULT now()"
SCRIPT_RECORDS = "key bytea PRIMARY KEY, mailbox text, record text, until timestamptz"
MAKE_TABLES = [
    # "IF NOT EXISTS" fails if two processes make a table at the same moment.
    ("SELECT pg_advisory_xact_lock(0)", ()),
    (f"CREATE TABLE IF NOT EXISTS deliveries ({DELIVERIES})", ()),
    (f"CREATE TABLE IF NOT EXISTS script_records ({SCRIPT_RECORDS})", ()),
    ("CREATE INDEX IF NOT EXISTS deliveries_at ON deliveries (at)", ()),
    ("CREATE INDEX IF NOT EXISTS script_records_until ON script_records (until)", ()),
]
HAS_RECORD = "SELECT 1 FROM script_records WHERE key = $1 AND until BETWEEN now() AND now() + make_interval(secs => $2)"
WRITE = "INSERT INTO script_records (key, until) VALUES ('', now()) ON CONFLICT (key) DO UPDATE SET until = now()", ()
SESSION_SETTINGS = {  # of the server; libpq takes a space after a backslash
    "default_transaction_isolation": r"read\ committed",
    "bytea_output": "hex",
    "synchronous_commit": "off",  # if the server crashes, a lost record means a second copy, not a lost message
    "lock_timeout": "5s",  # how long a claim waits for that of another process
    "statement_timeout": "8s",  # how long it waits for several, one after the other
    # With these, the server notices that a client's host has crashed.
    "tcp_keepalives_idle": "20",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "50s",
}
SERVER_PATIENCE = 10.0  # seconds to wait for the server's answer: more than statement_timeout
EXPIRED_INTERVAL = 100  # new records after which the expired ones are deleted
# lock_not_available, deadlock_detected, query_canceled: PostgreSQL, appendix A
LOCKED_STATES = (b"55P03", b"40P01", b"57014")


class RecordLocked(Unavailable):
    """Another process holds a lock for too long."""


class ServerConnection:
    """A connection to a PostgreSQL server. Source: libpq, by psycopg.pq, which waits no longer than it is told to.

    The statements of a call are sent together, and each is prepared when it comes first: libpq, pipeline mode.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection, self._libpq = connection, connection.pgconn
        self._libpq.nonblocking = 1
        self._libpq.enter_pipeline_mode()
        self._prepared: dict[str, bytes] = {}  # the names of statements
        self.is_lost = False  # whether the server had closed the connection when a call failed

    def close(self) -> None:
        """Closes it. The server rolls a transaction back."""
        self._connection.close()

    def run(self, *statements: Statement) -> list[str]:
        """The first column of the rows that the last statement returns.

        Raises RecordLocked, and Unavailable for all other errors. These close the connection: if its results have not
        been read, the next call would take them for its own.
        """
        names = dict(self._prepared)
        sent: list[str] = []  # the statement that each result tells to be prepared, "" if it tells something else
        try:
            for statement, values in statements:
                if statement not in names:
                    names[statement] = f"s{next(NAMES_MADE)}".encode()
                    self._libpq.send_prepare(names[statement], statement.encode())
                    sent.append(statement)
                self._libpq.send_query_prepared(names[statement], [as_parameter(value) for value in values])
                sent.append("")
            self._libpq.pipeline_sync()
            return self._results(iter(sent), names)
        except RecordLocked:
            raise
        except BaseException as error:
            self.is_lost = self._libpq.status != 0  # CONNECTION_OK
            self.close()
            if isinstance(error, Unavailable) or not isinstance(error, Exception):
                raise
            raise Unavailable(" ".join(str(error).split()) or type(error).__name__) from None

    def _results(self, sent: Iterator[str], names: dict[str, bytes]) -> list[str]:
        """Reads all results, and keeps the names of what has been prepared. Raises Unavailable and psycopg.Error."""
        import select

        from psycopg.pq import DiagnosticField, ExecStatus

        libpq = self._libpq
        deadline = time.monotonic() + SERVER_PATIENCE
        answers = select.poll()

        def wait(events: int) -> None:
            answers.register(libpq.socket, events)
            if not answers.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise Unavailable(f"no answer within {SERVER_PATIENCE:.0f} seconds")
            libpq.consume_input()

        while libpq.flush():
            wait(select.POLLIN | select.POLLOUT)
        rows: list[str] = []
        failure: Unavailable | None = None
        while True:
            while libpq.is_busy():
                wait(select.POLLIN)
            result = libpq.get_result()
            if result is None:  # the results of one statement have ended
                if libpq.status != 0:  # CONNECTION_OK
                    raise failure or Unavailable("the server has closed the connection")
                continue
            if result.status == ExecStatus.PIPELINE_SYNC:
                break
            statement = next(sent, "")
            if result.status in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
                if statement:
                    self._prepared[statement] = names[statement]
                rows = [(result.get_value(row, 0) or b"").decode() for row in range(result.ntuples)]
            elif not failure:
                kind = RecordLocked if result.error_field(DiagnosticField.SQLSTATE) in LOCKED_STATES else Unavailable
                failure = kind(" ".join(result.error_message.decode(errors="replace").split()))
        if failure:
            raise failure
        return rows


class Servers:
    """The PostgreSQL servers that may have the records. str() is their name for the log."""

    def __init__(self, config: Config) -> None:
        self._config, self._places = config, config.sql_hostnames or (("", 5432),)

    def __str__(self) -> str:
        hosts = ",".join(host for host, _ in self._places) or "localhost"
        database = self._config.sql_database or self._config.sql_user
        return f"{database}@{hosts}" if database else hosts

    def connect(self, read_only: bool) -> ServerConnection:
        """A connection to the first server that answers; to one that can be written, unless read_only.

        Raises Unavailable.
        """
        try:
            import psycopg
        except (ImportError, OSError) as error:
            raise Unavailable(f"the Python package psycopg is needed: {' '.join(str(error).split())}") from None
        for name in [name for name in os.environ if name.startswith("PG")]:  # libpq would let them change the settings
            del os.environ[name]
        causes = []
        for host, port in self._places:
            try:
                connection = psycopg.connect(**self._settings(host, port, read_only))
                encoding = connection.info.parameter_status("server_encoding")
                if encoding in ("UTF8", "SQL_ASCII"):
                    return ServerConnection(connection)
                connection.close()
                causes.append(f"the database has the encoding {encoding}: make one with the encoding UTF8")
            except (psycopg.Error, OSError, ValueError) as error:
                causes.append(" ".join(str(error).split()))
        raise Unavailable("; ".join(causes))

    def _settings(self, host: str, port: int, read_only: bool) -> dict[str, Any]:
        """The parameters of a connection, as libpq has them."""
        config = self._config
        given = {
            "host": host,
            "user": config.sql_user,
            "password": config.sql_passwd,
            "dbname": config.sql_database,
            "sslmode": "verify-full" if config.sql_usessl else "",
            "sslrootcert": config.sql_tls_ca_file if config.sql_usessl else "",
        }
        settings: dict[str, Any] = {name: value for name, value in given.items() if value}
        return settings | {
            "port": port,
            "application_name": "lmtpd",
            "autocommit": True,
            "client_encoding": "UTF8",
            "connect_timeout": round(DATABASE_PATIENCE),
            "gssencmode": "disable",
            "options": " ".join(f"-c {name}={value}" for name, value in SESSION_SETTINGS.items()),
            "sslcert": "/nonexistent",  # not that in a home which this account perhaps may not enter
            "target_session_attrs": "any" if read_only else "read-write",
        }


class ServerRecords(Records):
    """The records in a PostgreSQL database, for the processes of several hosts. The times are those of its clock.

    A claim is a transaction that adds the records of a message before it is stored. Another process that wants to add
    the same waits for its end. If the process or its connection ends, the server takes the records back.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        import hashlib  # noqa: F401  # for key_of(), which is called when there may be no descriptor left

        if config.sql_engine != "pgsql":
            raise ConfigError(f"sql_engine: '{config.sql_engine}' is not possible: set sql_engine: pgsql")
        self._servers = Servers(config)
        super().__init__(str(self._servers), config)
        self._connection: ServerConnection | None = None
        self._is_claiming = False
        self._new = EXPIRED_INTERVAL

    def exists(self) -> bool:
        """See Records.exists()."""
        return bool(self._try(TABLES_EXIST))

    def check(self) -> None:
        """See Records.check()."""
        self._connection = self._servers.connect(read_only=False)
        if not self._run(TABLES_EXIST) and not self._run(MAY_MAKE_TABLES):
            raise Unavailable(f"{self._servers}: there are no tables, and the user may not make them")

    def prepare(self) -> None:
        """See Records.prepare()."""
        super().prepare()
        import psycopg  # noqa: F401

    def claim(self, claim: Claim) -> None:
        """See Records.claim()."""
        if self._is_claiming:  # the delivery before has not come to its end
            self._close()
        wanted = {key_of(claim.message_id, claim.date, mailbox): mailbox for mailbox in claim.mailboxes}
        if self._is_given_up():
            return
        self._is_claiming = True
        try:
            try:
                claimed = self._run(BEGIN, insertion_of(claim, wanted, self._expiry))
            except RecordLocked:
                claimed = self._claim_each(claim, wanted)
            others = [key for key in wanted if key not in claimed and wanted[key] not in claim.busy]
            claim.delivered = {wanted[key] for key in self._recorded(others)}
        except Unavailable as error:
            claim.busy.clear()
            self._fail(error)
            return
        self._is_claiming = True  # perhaps on another connection than in the beginning

    def settle(self, claim: Claim, mailboxes: Sequence[str]) -> None:
        """See Records.settle()."""
        stored = {key_of(claim.message_id, claim.date, mailbox): mailbox for mailbox in mailboxes}
        failed = set(claim.mailboxes) - claim.delivered - claim.busy - set(mailboxes)
        if self._is_claiming and self._connection:
            keys = [key_of(claim.message_id, claim.date, mailbox) for mailbox in failed]
            give_back = f"DELETE FROM deliveries WHERE key IN ({parameters(len(keys))})", keys
            end = [*([give_back] if failed else ()), COMMIT, *self._deletion(len(stored))]
            try:
                self._connection.run(*(end if stored else [ROLLBACK]))
                self._is_claiming = False
                return
            except Unavailable:
                self._close()
        if stored:  # the server has lost the claim, or could not be asked for one
            self._try(insertion_of(claim, stored, self._expiry))

    def has(self, mailbox: str, record: str) -> bool:
        """See Records.has()."""
        # What lasts longer was written while the clock was wrong.
        return bool(self._try((HAS_RECORD, (key_of(mailbox, record), LONGEST_RECORD))))

    def add(self, mailbox: str, records: dict[str, int]) -> None:
        """See Records.add()."""
        if not records:
            return
        rows = {key_of(mailbox, record): (mailbox, record, seconds) for record, seconds in records.items()}
        places = [f"(${n}, ${n + 1}, ${n + 2}, now() + make_interval(secs => ${n + 3}))" for n in every(4, rows)]
        insert = (
            f"INSERT INTO script_records (key, mailbox, record, until) VALUES {', '.join(places)} "
            "ON CONFLICT (key) DO UPDATE SET until = excluded.until"
        )
        values = [value for key in sorted(rows) for value in (key, *rows[key])]
        self._try((insert, values), deletion_of("script_records", "until", 0, EXPIRED_AT_ONCE + len(records)))

    def is_usable(self) -> bool:
        """See Records.is_usable()."""
        return self._try(WRITE) is not None

    def lock(self, mailbox: str, record: str) -> AdvisoryLock:
        """See Records.lock()."""
        return AdvisoryLock(self, int(key_of(mailbox, record)[-15:], 16) if record else 0)

    def take(self, number: int) -> bool:
        """Takes a lock that only one process of all hosts can have; whether that was possible."""
        deadline = time.monotonic() + SENDING_PATIENCE
        while not self._is_given_up():
            try:
                self._run(("SELECT pg_advisory_lock($1)", (number,)))
                return True
            except RecordLocked as error:
                if time.monotonic() > deadline:
                    log.warning("record-not-locked", cause=error)
                    return False
            except Unavailable as error:
                self._fail(error)
        return False

    def give_back(self, number: int) -> None:
        """Gives a lock back that take() has taken."""
        self._try(("SELECT pg_advisory_unlock($1)", (number,)))

    def _claim_each(self, claim: Claim, wanted: dict[str, str]) -> list[str]:
        """The same as claim(), one mailbox after the other, so that only those are busy that others have claimed."""
        claimed: list[str] = []
        connection = self._connection or self._open()
        connection.run(ROLLBACK, BEGIN, BRIEF_LOCKS)
        try:
            connection.run(LOCK_TABLE)
        except RecordLocked as error:  # somebody has locked the table, and no message is under way
            raise Unavailable(str(error)) from None
        for key, mailbox in sorted(wanted.items()):
            try:
                claimed += connection.run(SAVEPOINT, insertion_of(claim, {key: mailbox}, self._expiry))
            except RecordLocked:
                connection.run(ROLLBACK_TO_SAVEPOINT)
                claim.busy.add(mailbox)
        return claimed

    def _recorded(self, keys: Sequence[str]) -> Sequence[str]:
        """The keys, if each has a record. Else raises Unavailable: a trigger, for instance, keeps records out."""
        if not keys:
            return ()
        question = f"SELECT key FROM deliveries WHERE key IN ({parameters(len(keys))})"
        if not self._connection or set(self._connection.run((question, keys))) != set(keys):
            raise Unavailable("the database does not keep records")
        return keys

    def _deletion(self, new: int) -> list[Statement]:
        """What deletes expired records of deliveries, now and then. new: how many records are added."""
        self._new += new
        if self._new < EXPIRED_INTERVAL:
            return []
        limit, self._new = EXPIRED_AT_ONCE + 2 * self._new, 0
        return [deletion_of("deliveries", "at", self._expiry, limit)]

    def _is_given_up(self) -> bool:
        return not self._connection and self._backoff.is_active()

    def _try(self, *statements: Statement) -> list[str] | None:
        """As run(); None if the database cannot be used."""
        if self._is_given_up():
            return None
        try:
            return self._run(*statements)
        except RecordLocked as error:
            log.warning("record-not-locked", cause=error)
        except Unavailable as error:
            self._fail(error)
        return None

    def _run(self, *statements: Statement) -> list[str]:
        """As ServerConnection.run(), on another connection if the server has closed the one before."""
        if connection := self._connection:
            try:
                return connection.run(*statements)
            except Unavailable:
                if not connection.is_lost:
                    raise
                self._close()
        return self._open().run(*statements)

    def _fail(self, error: Unavailable) -> None:
        if not self._backoff.is_active():  # else another process has logged it
            self._give_up(error)
        self._close()

    def _open(self) -> ServerConnection:
        """Connects, and makes the tables if they are missing. Raises Unavailable."""
        self._connection = connection = self._servers.connect(self._read_only)
        if not self._read_only and not connection.run(TABLES_EXIST):
            connection.run(BEGIN, *MAKE_TABLES, COMMIT)
        return connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        self._is_claiming = False
        if connection:
            connection.close()


class AdvisoryLock:
    """See Records.lock(). number: 0 for no lock. The lock ends with the connection. Source: PostgreSQL, 13.3.5."""

    def __init__(self, records: ServerRecords, number: int) -> None:
        self._records, self._number = records, number
        self._is_held = False

    def __enter__(self) -> None:
        self._is_held = bool(self._number) and self._records.take(self._number)

    def __exit__(self, *_: object) -> None:
        if self._is_held:
            self._records.give_back(self._number)


def records_of(config: Config) -> Records:
    """The records that the configuration wants. Raises ConfigError."""
    return ServerRecords(config) if config.duplicate_db == "sql" else FileRecords(config)


def key_of(*parts: str) -> str:
    """The key of a record, as PostgreSQL writes octets: a hash, for an index takes no long texts."""
    import hashlib

    text = "\0".join(parts).encode("utf-8", "surrogateescape")
    return rf"\x{hashlib.sha256(text).hexdigest()}"


def as_parameter(value: object) -> bytes:
    """A parameter of a statement, as text without what PostgreSQL's texts cannot have."""
    return str(value).encode("utf-8", "backslashreplace").replace(b"\0", b"\\0")


def parameters(count: int) -> str:
    """The places of so many parameters in a statement."""
    return ", ".join(f"${number}" for number in range(1, count + 1))


def every(step: int, rows: Sized, first: int = 1) -> range:
    """The numbers of the first parameter of each row, if a row has so many."""
    return range(first, first + step * len(rows), step)


def insertion_of(claim: Claim, wanted: dict[str, str], expiry: int) -> Statement:
    """What adds records of deliveries, given by their keys, and returns the keys of those that were not there.

    expiry: seconds after which a record is as good as none.
    """
    places = [f"(${n}, $1, $2, ${n + 1})" for n in every(2, wanted, 3)]
    # A time in the future was written while the clock was wrong.
    statement = (
        f"INSERT INTO deliveries (key, message_id, date, mailbox) VALUES {', '.join(places)} "
        "ON CONFLICT (key) DO UPDATE SET at = now() WHERE deliveries.at "
        f"NOT BETWEEN now() - interval '{expiry} seconds' AND now() + interval '1 day' RETURNING key"
    )
    # All processes add records in the same order, so that no two wait for each other.
    values = [value for key in sorted(wanted) for value in (key, wanted[key])]
    return statement, (claim.message_id, claim.date, *values)


def deletion_of(table: str, column: str, age: int, limit: int) -> Statement:
    """What deletes so many of the oldest records whose time has passed by so many seconds."""
    expired = f"SELECT key FROM {table} WHERE {column} < now() - interval '{age} seconds' ORDER BY {column} LIMIT $1"
    return f"DELETE FROM {table} WHERE key IN ({expired} FOR UPDATE SKIP LOCKED)", (limit,)


# ======================================================================
# Submission
#
# Owns how mail leaves: by SMTP to a server, or by the program sendmail.
# Must not know why it is sent.
# ======================================================================

SEND_PATIENCE = 60  # seconds for each reply of the server, and for the program
FINAL_PATIENCE = 300  # seconds for the reply to the message: else the client sends again what the server has taken
PERMANENT_STATUSES = (65, 67, 68, 69)  # of sendmail, EX_DATAERR, NOUSER, NOHOST and UNAVAILABLE: sysexits(3)
SAID_LIMIT = 4096  # octets of what the program says


class NotSent(Exception):
    """Mail could not be sent. permanent: whether it cannot be sent later, either. The text says why, for the log.

    is_down: whether other mail could not be sent now, either.
    """

    def __init__(self, text: str, permanent: bool = False, is_down: bool = False) -> None:
        super().__init__(text)
        self.permanent, self.is_down = permanent, is_down


class Submission:
    """Hands messages to the server smtp_host, or to the program sendmail, as smtp_backend says. It has no queue."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._backoff = Backoff(f"{config.configdirectory}/smtp.backoff")

    def prepare(self) -> None:
        """Imports what is needed, before workers fork."""
        if self._config.smtp_backend == "host":
            import encodings.idna  # noqa: F401
            import smtplib  # noqa: F401
        else:  # if its file cannot be looked at for a moment, Python takes the directory for an empty module
            import re  # noqa: F401

    def send(
        self, message: Message, reverse_path: Address | None, recipients: Sequence[Address], is_automatic: bool
    ) -> None:
        """Sends a message without its Return-Path. reverse_path: None for <>.

        is_automatic: whether the sender wants no report about the delivery. Raises NotSent, and OSError if the message
        cannot be read.
        """
        variant = message.with_header(Header(message.header.without(b"return-path")))
        if reverse_path and not reverse_path.domain:
            reverse_path = Address(reverse_path.local, self._config.servername)
        if self._backoff.is_active():
            raise NotSent(f"{self._name} has failed a moment ago, and is left alone for {BACKOFF:.0f} seconds")
        try:
            if self._config.smtp_backend == "sendmail":
                run_sendmail(self._config.sendmail, variant, reverse_path, recipients, self._config.configdirectory)
            else:
                self._send_by_smtp(variant, reverse_path, recipients, is_automatic)
        except ImportError as error:  # there is no descriptor, or no memory, to load a module
            raise NotSent(text_of(error)) from None
        except NotSent as error:
            if error.is_down:
                self._backoff.start()
            raise

    @property
    def _name(self) -> str:
        host, port, _ = self._config.smtp_host
        return self._config.sendmail if self._config.smtp_backend == "sendmail" else f"{host}:{port}"

    def _send_by_smtp(
        self, message: Message, reverse_path: Address | None, recipients: Sequence[Address], is_automatic: bool
    ) -> None:
        """See send(). Source: RFC 5321 section 3.3."""
        import smtplib

        try:
            server = self._connected()
        except (smtplib.SMTPException, OSError, UnicodeError) as error:
            raise NotSent(f"{self._name}: {text_of_smtp_error(error)}", is_down=True) from None
        try:
            SmtpDialogue(server, self._name).deliver(message, reverse_path, recipients, is_automatic)
        except (smtplib.SMTPException, ConnectionError, socket.timeout) as error:
            raise NotSent(f"{self._name}: {text_of_smtp_error(error)}", is_down=True) from None
        finally:
            try:
                server.close()
            except OSError as error:  # perhaps the server has taken the message
                log.debug("farewell-failed", server=self._name, cause=error)

    def _connected(self) -> SMTP:
        """A connection on which mail may be sent. Raises SMTPException and OSError."""
        import smtplib

        config = self._config
        host, port, words = config.smtp_host
        server = smtplib.SMTP(host, port, config.servername, SEND_PATIENCE)
        try:
            if server.sock:  # else the end of a small message waits for an acknowledgement of its beginning
                server.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.ehlo_or_helo_if_needed()
            if "tls" in words:
                from ssl import create_default_context

                server.starttls(context=create_default_context(cafile=config.smtp_tls_ca_file or None))
                server.ehlo_or_helo_if_needed()
            if config.smtp_auth_authname and "noauth" not in words:
                if "tls" not in words and server.sock and not is_loopback(server.sock.getpeername()[0]):
                    raise smtplib.SMTPException("no password is sent without TLS: add /tls to smtp_host")
                server.login(config.smtp_auth_authname, config.smtp_auth_password)
        except BaseException:
            server.close()
            raise
        return server


class SmtpDialogue:
    """A transaction with a server. name: the server's, for errors."""

    def __init__(self, server: SMTP, name: str) -> None:
        self._server, self._name = server, name

    def deliver(
        self, message: Message, reverse_path: Address | None, recipients: Sequence[Address], is_automatic: bool
    ) -> None:
        """See Submission.send(). Raises SMTPException, too."""
        server = self._server
        options = self._options(message, [*recipients, *filter(None, (reverse_path,))])
        self._command(f"MAIL FROM:<{reverse_path or ''}>{options}", 250)
        notify = " NOTIFY=NEVER" if is_automatic and server.has_extn("dsn") else ""
        for recipient in recipients:
            self._command(f"RCPT TO:<{recipient}>{notify}", 250, 251)
        self._command("DATA", 354)
        for piece in on_the_wire(message):
            server.send(piece)
        if server.sock:
            server.sock.settimeout(FINAL_PATIENCE)
        server.send(b".\r\n")
        self._expect(server.getreply(), *range(200, 300))
        try:
            server.putcmd("QUIT")  # the answer is not waited for: what has been sent is to be recorded
        except OSError as error:  # the server has taken the message
            log.debug("farewell-failed", server=self._name, cause=error)

    def _options(self, message: Message, addresses: Iterable[Address]) -> str:
        """The parameters of MAIL, each with a space before it. Raises NotSent if the server lacks what is needed."""
        server, options = self._server, ""
        if server.has_extn("size"):
            options += f" SIZE={message.size + message.lines}"
        if server.has_extn("8bitmime"):
            options += " BODY=8BITMIME"
        elif not is_ascii(message):
            raise NotSent(f"{self._name}: does not offer 8BITMIME", permanent=True)
        if not all(str(address).isascii() for address in addresses):
            if not server.has_extn("smtputf8"):
                raise NotSent(f"{self._name}: does not offer SMTPUTF8", permanent=True)
            server.command_encoding = "utf-8"
            options += " SMTPUTF8"
        return options

    def _command(self, line: str, *expected: int) -> None:
        self._expect(self._server.docmd(line), *expected, after=line.partition(":")[0])

    def _expect(self, reply: tuple[int, bytes], *expected: int, after: str = "the message") -> None:
        """Raises NotSent unless the reply has one of the expected codes."""
        code, text = reply
        if code not in expected:
            said = text.decode("utf-8", "backslashreplace").replace("\n", " ")
            raise NotSent(f"{self._name}: {code} {said} (after {after})", permanent=500 <= code < 600)


def text_of_smtp_error(error: Exception) -> str:
    """What an exception of smtplib says, in one line."""
    code, said = getattr(error, "smtp_code", None), getattr(error, "smtp_error", b"")
    if code is None:
        return text_of(error)
    return f"{code} {said.decode('utf-8', 'backslashreplace') if isinstance(said, bytes) else said}"


def is_loopback(address: str) -> bool:
    """Whether an IP address is one of this host's loopback interface."""
    return address == "::1" or address.startswith("127.")


def is_ascii(message: Message) -> bool:
    """Whether the message has no 8-bit octets. Raises OSError."""
    return all(piece.isascii() for piece in message.stream())


def on_the_wire(message: Message) -> Iterator[bytes]:
    """The octets of a message as DATA sends them, up to the dot, with a space for a lone CR. Raises OSError.

    Were a lone CR made a line end, it could divide a field of the header into two.
    Source: RFC 5321 sections 2.3.8 and 4.5.2.
    """
    held, before = b"", LF
    for piece in itertools.chain(message.stream(), (b"",)):
        data = held + piece
        held = b""
        if b"\r" in data:
            if data.endswith(b"\r") and piece:
                data, held = data[:-1], b"\r"
            data = data.replace(CRLF, LF).replace(b"\r", b" ")
        if data:
            yield (before + data).replace(b"\n.", b"\n..")[len(before) :].replace(LF, CRLF)
            before = LF if data.endswith(LF) else b""
    if not before:
        yield CRLF


def run_sendmail(
    program: str, message: Message, reverse_path: Address | None, recipients: Sequence[Address], folder: str
) -> None:
    """Gives a message to the program. folder: for the file that it reads.

    Were it a pipe, the program would send half a message if this process were killed. Raises NotSent, and OSError if
    the message cannot be read, or the file not written. Source: Postfix' and Exim's sendmail(1), sysexits(3).
    """
    from tempfile import TemporaryFile

    is_sent = False
    try:
        with TemporaryFile(dir=folder) as text, TemporaryFile(dir=folder) as output:
            for piece in message.stream():
                text.write(piece)
            size = text.tell()
            text.seek(0)
            status = status_of_sendmail(
                [program, "-i", "-oep", "-f", str(reverse_path or "<>"), "--", *map(str, recipients)], text, output
            )
            if status:
                said = os.pread(output.fileno(), SAID_LIMIT, 0).decode("utf-8", "backslashreplace").split("\n")
                lines = "; ".join(filter(None, map(str.strip, said)))
                cause = f"{program}: exit status {status}: {lines or 'it does not say why'}"
                raise NotSent(cause + hint_at_host(), permanent=status in PERMANENT_STATUSES)
            is_sent = True
            if os.lseek(text.fileno(), 0, os.SEEK_CUR) < size:
                raise NotSent(f"{program}: has not read the whole message")
    except OSError:
        if not is_sent:
            raise


def status_of_sendmail(command: Sequence[str], text: IO[bytes], output: IO[bytes]) -> int:
    """Runs the program with files as its input and output; its exit status. Raises NotSent."""
    import subprocess

    # The real ids may still be root's, see drop_privileges().
    user, group = (os.geteuid(), os.getegid()) if os.getuid() != os.geteuid() else (None, None)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:  # the system would reap the program, and its status
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            command, stdin=text, stdout=output, stderr=output, cwd="/", user=user, group=group, start_new_session=True
        )
    except OSError as error:
        raise NotSent(text_of(error) + hint_at_host(), is_down=True) from None
    try:
        return process.wait(SEND_PATIENCE)
    except subprocess.TimeoutExpired:
        cause = f"{command[0]}: has not ended after {SEND_PATIENCE} seconds{hint_at_host()}"
        raise NotSent(cause, is_down=True) from None
    finally:
        if process.poll() is None:  # Postfix' postdrop, which it has started, would try for ever
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def hint_at_host() -> str:
    """What to set where systemd lets no program gain privileges: then sendmail cannot write to its queue."""
    try:
        with open("/proc/self/status", "rb") as status:
            is_confined = b"\nNoNewPrivs:\t1\n" in status.read()
    except OSError:
        return ""
    return " (with NoNewPrivileges= no sendmail can work: set smtp_backend: host, and smtp_host)" if is_confined else ""


# ======================================================================
# Answers
#
# Owns the messages that this host writes itself, who must not get one, and what is
# sent for a user.
# Must not know commands of scripts, and how mail is sent.
# ======================================================================

BULK_WORDS = frozenset(("bulk", "junk", "list"))  # of Precedence
SUPPRESSING_WORDS = frozenset(("all", "autoreply", "oof"))  # of X-Auto-Response-Suppress
MACHINES = frozenset(("listserv", "mailer-daemon", "majordomo"))  # local parts of senders where no person reads
ADDRESSEE_FIELDS = ("to", "cc", "bcc", "resent-to", "resent-cc", "resent-bcc")
ENTITY_FIELDS = ("type", "transfer-encoding", "disposition", "description", "id", "language")  # after Content-
SUBJECT_LIMIT = 500  # characters of a subject that an answer repeats
REFERENCES_LIMIT = 10  # message ids in References
TEXT_LINE_LIMIT = 998  # octets of a line of a message, RFC 5322 section 2.1.1
ADDRESS_LIMIT = 1000  # characters of an address with its display name
URI_NAME_LIMIT = 70  # characters of the name of a field in a URI
MAILTO_RECIPIENTS_LIMIT = 8
RESERVED_FIELDS = (  # which a URI cannot set: RFC 5436 section 2.7
    *("auto-submitted", "bcc", "date", "from", "importance", "message-id", "mime-version", "received", "references"),
    *("return-path", "sender"),
)
IMPORTANCE = {"1": "high", "2": "normal", "3": "low"}  # RFC 5435 section 3.4, RFC 4021 section 2.1.54
ANSWERED_LATELY = "the sender has had this answer lately"  # why there is none
PLAIN_REASON = "The recipient does not accept this message"  # where the user's own text cannot be told


class Outgoing:
    """Mail that is to be sent for a user.

    action: "redirect", "reject", "vacation" or "notify". reverse_path: None for <>. compose: makes the message out of
    the one that has arrived. record: what is recorded once it is sent; "" for nothing. seconds: for how long the record
    counts; 0: as long as this message can come again. filing: where a copy goes then; None for none. withheld: why it
    is not sent; "" if it is.
    """

    def __init__(
        self,
        action: str,
        recipients: Sequence[Address],
        reverse_path: Address | None,
        compose: Callable[[Message], Message],
        record: str,
        seconds: int = 0,
    ) -> None:
        self.action, self.recipients, self.reverse_path = action, recipients, reverse_path
        self.compose, self.record, self.seconds = compose, record, seconds
        self.filing: Filing | None = None
        self.withheld = ""

    @property
    def to(self) -> str:
        """The recipients as text."""
        return ", ".join(map(str, self.recipients))

    def __str__(self) -> str:
        withheld = f" (not sent: {self.withheld})" if self.withheld else ""
        return f"{self.action} {self.to}{withheld}"


class Filing:
    """A copy for a folder. folder: the name of its directory. flags: those of the copy.

    header: the changed header; None if it is the message's own. number: the later one counts. is_named: whether
    a script has named the folder.
    """

    __slots__ = ("flags", "folder", "header", "is_named", "number")

    def __init__(self, folder: str, flags: Sequence[str], header: Header | None, number: int) -> None:
        self.folder, self.flags, self.header, self.number = folder, flags, header, number
        self.is_named = False


def reason_for_silence(header: Header, sender: Address | None) -> str:
    """Why a message must not be answered automatically; "" if it may. header: as it has arrived.

    Source: RFC 3834 section 2, RFC 5230 section 4.6.
    """
    if not sender:
        return "the sender is <>"
    local = sender.local.lower()
    if local in MACHINES or local.startswith("owner-") or local.endswith("-request"):
        return f"the sender is <{sender}>"
    if name := header.name_with(b"list-"):
        return f"the message has a field {name[:SUBJECT_LIMIT]}"
    for name, is_decisive in SILENCING_FIELDS.items():
        for start, end in header.spans(name.lower().encode()):
            value = raw_text(header.octets[start:end].partition(b":")[2]).strip()
            if is_decisive(value):
                return f"{name}: {value[:SUBJECT_LIMIT]}"
    return ""


def is_from_machine(header: Header, sender: Address | None) -> bool:
    """Whether no report must be sent about a message: it is one itself, or no person has sent it (RFC 3834)."""
    return not sender or any(
        is_automatic(raw_text(header.octets[start:end].partition(b":")[2]).strip())
        for start, end in header.spans(b"auto-submitted")
    )


def is_bulk(precedence: str) -> bool:
    """Whether a value of Precedence is that of mail to many."""
    return keyword_in(precedence) in BULK_WORDS


def is_automatic(auto_submitted: str) -> bool:
    """Whether a value of Auto-Submitted says that no person has sent the message. Source: RFC 3834 section 5."""
    return keyword_in(auto_submitted) != "no"


def keyword_in(value: str) -> str:
    """The word in the value of a field, without comments and parameters."""
    return value_and_parameters(octets_of(value))[0].strip().lower()


def suppresses_answers(auto_response_suppress: str) -> bool:
    """Whether a value of X-Auto-Response-Suppress wants no answer of a vacation script."""
    return not SUPPRESSING_WORDS.isdisjoint(auto_response_suppress.lower().replace(",", " ").replace(";", " ").split())


SILENCING_FIELDS = {
    "Precedence": is_bulk,
    "Auto-Submitted": is_automatic,
    "X-Auto-Response-Suppress": suppresses_answers,
}


def complete_address(recipient: Recipient, config: Config) -> Address:
    """The address of a recipient as given, with a domain in any case."""
    given = recipient.address
    return given if given.domain else Address(given.local, config.defaultdomain or config.servername)


def own_addresses(recipient: Recipient, config: Config) -> dict[str, Address]:
    """The addresses of a recipient, by comparable(): as given, without the detail, and the userid."""
    given = complete_address(recipient, config)
    own = [recipient.address, given, Address(recipient.user, given.domain)]
    if recipient.domain:
        own.append(Address(recipient.user, recipient.domain))
    return {comparable(address): address if address.domain else given for address in reversed(own)}


def comparable(address: Address) -> str:
    """An address in the form in which addresses are compared."""
    if not address.domain:
        return address.local.lower()
    return f"{address.local.lower()}@{domain_spellings(address.domain)[-1]}"


def addressee(header: Header, own: dict[str, Address]) -> Address | None:
    """The first of a user's addresses to which the message is addressed; None if it is to none of them."""
    for name in ADDRESSEE_FIELDS:
        for start, end in header.spans(name.encode()):
            for _, local, domain in mailboxes_of(header.octets[start:end].partition(b":")[2]):
                is_short = len(local) + len(domain) <= PATH_LIMIT  # what is longer is nobody's, and slow to compare
                if is_short and (found := own.get(comparable(Address(local, domain)))):
                    return found
    return None


def strict_address(text: str) -> tuple[str, Address]:
    """The display name and the address in "local@domain" or "Name <local@domain>". Raises ValueError.

    Source: RFC 5228 section 2.4.2.3.
    """
    if len(text) > ADDRESS_LIMIT:
        raise ValueError(f"an address has at most {ADDRESS_LIMIT} characters with its name")
    text = text.strip()
    before, angle, rest = text.rpartition("<")
    inner = rest[:-1] if angle and text.endswith(">") else text
    try:
        address, after = parse_path(f"<{inner}>")
    except ValueError:
        address, after = None, ""
    quoted = inner.startswith('"')
    if not address or after or not address.domain or inner.startswith("@"):
        raise ValueError(f"{text!r} is no address: write one such as jane@example.com")
    labels = address.domain.split(".")
    words = address.local.split(".")
    unquoted = "".join(before.split('"')[::2])
    is_plain = all(words) and is_made_of(address.local, DOT_STRING)
    if not all(labels) or not (quoted or is_plain) or not set("<>@,;:").isdisjoint(unquoted):
        raise ValueError(f"{text!r} is no address: write one such as jane@example.com")
    if not angle:
        return "", address
    found = mailboxes_of(text.encode("utf-8", "surrogateescape"))
    return found[0][0] if len(found) == 1 else "", address


def mailbox_text(name: str, address: Address) -> str:
    """An address with a display name, for a header field."""
    if not name:
        return str(address)
    phrase = encoded_if_needed(name[:SUBJECT_LIMIT])
    if phrase in name:  # not encoded: it may look so
        phrase = '"' + phrase.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{phrase} <{address}>"


def written_message(fields: Sequence[tuple[str, str]], entity: bytes, config: Config) -> Message:
    """A message of this host: the fields, those that every message has, and the entity with its fields of MIME."""
    complete = [*fields, ("Date", date_time()), ("Message-ID", new_message_id(config)), ("MIME-Version", "1.0")]
    header = b"".join(
        folded_addresses(name, value) if name in ("From", "To", "Cc") else folded_field(name, value)
        for name, value in complete
    )
    return Message.of(header + entity)


def folded_addresses(name: str, value: str) -> bytes:
    """A field of addresses, which have the form of a field already."""
    lines = value.replace("?= =?", "?=\n =?").replace(", ", ",\n ")
    return f"{name}: {lines}\n".encode("utf-8", "replace")


def text_entity(text: str) -> bytes:
    """Text as the body of a message, with its fields. Source: RFC 2045."""
    octets = lines_of_text(text)
    if octets.isascii() and all(len(line) <= TEXT_LINE_LIMIT for line in octets.split(LF)):
        encoding = b"7bit"
    else:
        from binascii import b2a_qp

        encoding, octets = b"quoted-printable", b2a_qp(octets, istext=True)
    return b"Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: %s\n\n%s" % (encoding, octets)


def lines_of_text(text: str) -> bytes:
    """Text of a script in UTF-8, with LF at the end of lines."""
    octets = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()
    octets = octets.replace(CRLF, LF).replace(b"\r", LF).replace(b"\0", b"")
    return octets if octets.endswith(LF) else octets + LF


def mime_entity(text: str) -> bytes:
    """An entity that a script has written: only its Content- fields count (RFC 5230 section 4.5)."""
    octets = lines_of_text(text)
    header = Header.of(octets)
    body = octets[len(header.octets) :].removeprefix(LF)
    fields = b""
    for name in ENTITY_FIELDS:
        for start, end in header.spans(b"content-" + name.encode()):
            fields += header.octets[start:end]
            break
    if not body.isascii() and b"transfer-encoding" not in fields.lower():
        fields += b"Content-Transfer-Encoding: 8bit\n"
    return fields + LF + body


def subject_of(header: Header) -> str:
    """The subject of a message, decoded."""
    return " ".join(unstructured(field_body(header, b"subject") or b"").split())[:SUBJECT_LIMIT]


def fields_of_reply(message: Message) -> list[tuple[str, str]]:
    """In-Reply-To and References for a reply (RFC 5322 section 3.6.4); none if the message has no Message-ID."""
    message_ids = [each for each in message.message_id.split() if is_message_id(each)]
    if not message.has_message_id or len(message_ids) != 1:
        return []
    header = message.header
    before = (header.body_of(b"references") or "").split()
    replied = (header.body_of(b"in-reply-to") or "").split()
    if not before and len(replied) == 1:
        before = replied
    references = [*filter(is_message_id, before), *message_ids]
    if len(references) > REFERENCES_LIMIT:
        references = [references[0], *references[1 - REFERENCES_LIMIT :]]
    return [("In-Reply-To", message_ids[0]), ("References", " ".join(references))]


def is_message_id(word: str) -> bool:
    """Whether it is a message id in angle brackets, short enough for a line."""
    return (
        word.startswith("<") and word.endswith(">") and word.isascii() and word.isprintable() and len(word) < WORD_LIMIT
    )


def vacation_answer(
    message: Message, sender: Address, author: str, subject: str, entity: bytes, config: Config
) -> Message:
    """The answer of somebody who is away. author: the value of From. subject: "" for that of the message.

    Source: RFC 5230 section 5, RFC 3834 section 3.1.
    """
    original = subject_of(message.header)
    fields = [
        ("From", author),
        ("To", str(sender)),
        ("Subject", " ".join(subject.split()) or (f"Auto: {original}" if original else "Automated reply")),
        *fields_of_reply(message),
        ("Auto-Submitted", "auto-replied"),
    ]
    return written_message(fields, entity, config)


def rejection_report(message: Message, sender: Address, recipient: Address, reason: str, config: Config) -> Message:
    """The report that a recipient has rejected a message. Source: RFC 5429 section 2.2, RFC 8098 section 3."""
    boundary = f"lmtpd.{time.time_ns()}.{os.getpid()}"
    has_id = message.has_message_id and is_message_id(message.message_id)
    original = f"Original-Message-ID: {message.message_id}\n" if has_id else ""
    kind = "rfc822" if str(recipient).isascii() else "utf-8"
    notice = (
        "Content-Type: message/disposition-notification\n\n"
        f"Reporting-UA: {config.servername}; lmtpd\n"
        f"Final-Recipient: {kind}; {recipient}\n"
        f"{original}"
        "Disposition: automatic-action/MDN-sent-automatically; deleted\n"
    )
    explanation = f"Your message to <{recipient}> was not accepted. The recipient's mail filter says:\n\n{reason}"
    parts = [
        text_entity(explanation),
        notice.encode(),
        b"Content-Type: text/rfc822-headers\nContent-Transfer-Encoding: 8bit\n\n"
        + message.header.octets[message.added :],
    ]
    report = "multipart/report; report-type=disposition-notification"
    entity = f'Content-Type: {report}; boundary="{boundary}"\n\n'.encode()
    entity += b"".join(f"--{boundary}\n".encode() + part.rstrip(LF) + b"\n\n" for part in parts)
    fields = [
        ("From", str(recipient)),
        ("To", str(sender)),
        ("Subject", f"Rejected: {subject_of(message.header)}"),
        *fields_of_reply(message),
        ("Auto-Submitted", "auto-replied (rejected)"),
    ]
    return written_message(fields, entity + f"--{boundary}--\n".encode(), config)


class Mailto:
    """A URI mailto:, as a method of the command notify. to, cc: the recipients. subject, body: "" for none.

    fields: others that the notification has.

    Source: RFC 6068, RFC 5436 section 2.1.
    """

    def __init__(self, uri: str) -> None:
        """Raises ValueError with a text that says what is wrong."""
        scheme, colon, rest = uri.strip().partition(":")
        if not colon or scheme.lower() != "mailto":
            raise ValueError(f"{uri[:SUBJECT_LIMIT]!r} is no method: write mailto: and an address")
        addresses, _, query = rest.partition("?")
        self.to: list[Address] = []
        self.cc: list[Address] = []
        self.to = self._addresses(*map(uri_text, addresses.split(",")))
        self.subject = self.body = ""
        self.fields: list[tuple[str, str]] = []
        for pair in filter(None, query.split("&")):
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair!r} in the URI has no value")
            text = uri_text(value)
            name = uri_text(name).lower()
            if name == "to":
                self.to += self._addresses(text)
            elif name == "cc":
                self.cc += self._addresses(text)
            elif name == "subject":
                self.subject = text
            elif name == "body":
                self.body = text
            elif not is_field_name(name) or len(name) > URI_NAME_LIMIT:
                raise ValueError(f"{name!r} in the URI is no name of a header field")
            elif name not in RESERVED_FIELDS and not name.startswith(("content-", "resent-")):
                self.fields.append((name.title(), text))
        if not self.to and not self.cc:
            raise ValueError("the URI has no recipient: write mailto: and an address")

    @property
    def recipients(self) -> list[Address]:
        """All recipients, each once."""
        return list({str(address): address for address in (*self.to, *self.cc)}.values())

    def _addresses(self, *texts: str) -> list[Address]:
        """The addresses in texts that have commas between them, save those that are recipients already."""
        parts = [part for text in texts for part in text.split(",") if part.strip()]
        if len(parts) + len(self.to) + len(self.cc) > MAILTO_RECIPIENTS_LIMIT:
            raise ValueError(f"the URI has more than {MAILTO_RECIPIENTS_LIMIT} recipients")
        found = [strict_address(part)[1] for part in parts]
        known = set(map(str, self.recipients))
        return [address for address in found if str(address) not in known]


def uri_text(text: str) -> str:
    """A part of a URI without its percent encoding. Raises ValueError."""
    for place in text.split("%")[1:]:
        if len(place) < 2 or not CODE_DIGITS.issuperset(place[:2]):
            raise ValueError("a % in the URI must be followed by two hexadecimal digits")
    decoded_text = percent_decoded(text.encode()).decode("utf-8", "replace")
    return decoded_text.replace("\r\n", "\n")


def notification(
    message: Message, mailto: Mailto, author: str, owner: Address, text: str, importance: str, config: Config
) -> Message:
    """A message that tells of another. owner: the user. text: what the script says; "" for what the URI says.

    importance: "1", "2" or "3". Source: RFC 5436 section 2.7.
    """
    original = subject_of(message.header)
    subject = text or mailto.subject or original or "New mail"
    sender = unstructured(field_body(message.header, b"from") or b"").strip()[:SUBJECT_LIMIT]
    body = mailto.body or f"There is new mail for {owner}.\n\nFrom: {sender}\nSubject: {original}\n"
    fields = [
        ("From", author),
        ("To", ", ".join(map(str, mailto.to))),
        ("Cc", ", ".join(map(str, mailto.cc))),
        ("Subject", " ".join(subject.split())[:SUBJECT_LIMIT]),
        ("Auto-Submitted", f'auto-notified; owner-email="{owner}"'),
        ("Importance", IMPORTANCE[importance]),
        *mailto.fields,
    ]
    return written_message([(name, value) for name, value in fields if value], text_entity(body), config)


# ======================================================================
# Sieve: syntax
#
# Owns tokens and the grammar of scripts: the text becomes a tree.
# Must not know which commands there are.
# ======================================================================

BLOCKS_LIMIT = 32  # how deep blocks and tests may be nested
NUMBER_LIMIT = 1 << 63  # RFC 5228 section 2.4.1 asks for 2**31 at least
IDENTIFIER_START = frozenset(LETTERS + "_")
IDENTIFIER = IDENTIFIER_START | DECIMAL
QUANTIFIERS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
# Kinds of tokens; a special character is its own kind.
NAME, TAG, NUMBER, STRING, END = "name", "tag", "number", "string", "end of the script"
STRINGS = "list of strings"
SPECIAL = frozenset("{}()[],;")


class ScriptError(Exception):
    """A script is wrong. text: what is wrong, and what to write instead. place: the index of the fault."""

    def __init__(self, text: str, place: int) -> None:
        super().__init__(text)
        self.text, self.place = text, place


class Token:
    """A token of a script. value: the text of a name or tag in lower case, the number, or the string's content."""

    __slots__ = ("end", "kind", "start", "value")

    def __init__(self, kind: str, value: str | int, start: int, end: int) -> None:
        self.kind, self.value, self.start, self.end = kind, value, start, end


def decoded_script(octets: bytes) -> str:
    """The text of a script, with LF at the end of lines. Raises ScriptError. Source: RFC 5228 section 2.1."""
    try:
        text = octets.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        before = octets[: error.start].decode("utf-8").replace("\r\n", "\n")
        raise ScriptError("is not UTF-8 text: save the script in the encoding UTF-8", len(before)) from None
    if text.startswith("\ufeff"):
        raise ScriptError("begins with a byte order mark: save the script as UTF-8 without it", 0)
    if (nul := text.find("\0")) >= 0:
        raise ScriptError("has a NUL byte, which no script may have: remove it", nul)
    return text


def tokens_of(text: str) -> Iterator[Token]:
    """The tokens of a script, END last. Raises ScriptError. Source: RFC 5228 section 8.1."""
    end = len(text)
    text += "\0"  # an end that no loop passes
    place = 0
    while place < end:
        character = text[place]
        if character in " \t\n":
            place += 1
        elif character == "#":
            place = text.find("\n", place) + 1 or end
        elif text.startswith("/*", place):
            stop = text.find("*/", place + 2)
            if stop < 0:
                raise ScriptError("the comment does not end: add */", place)
            place = stop + 2
        else:
            token = token_at(text, place, character)
            yield token
            place = token.end
    yield Token(END, "", end, end)


def token_at(text: str, start: int, character: str) -> Token:
    """The token that begins there with that character. Raises ScriptError."""
    if character in IDENTIFIER_START:
        stop = end_of_run(text, start, IDENTIFIER)
        word = text[start:stop].lower()
        return (
            multi_line(text, start, stop + 1)
            if word == "text" and text[stop] == ":"
            else Token(NAME, word, start, stop)
        )
    if character in SPECIAL:
        return Token(character, character, start, start + 1)
    if character == '"':
        return quoted_string(text, start)
    if character == ":":
        stop = end_of_run(text, start + 1, IDENTIFIER)
        if stop == start + 1 or text[start + 1] in DECIMAL:
            raise ScriptError("a colon must be followed by the name of a tag, such as :is", start)
        return Token(TAG, text[start:stop].lower(), start, stop)
    if character in DECIMAL:
        return number_at(text, start)
    raise ScriptError(unexpected_character(character), start)


def end_of_run(text: str, start: int, alphabet: frozenset[str]) -> int:
    """The index of the first character from start on that is not in the alphabet."""
    while text[start] in alphabet:
        start += 1
    return start


def unexpected_character(character: str) -> str:
    """What is wrong with a character outside of strings and comments."""
    if character == "\r":
        return "a CR alone ends no line: save the script with LF or CR LF at the end of lines"
    if character == "\f":
        return "the character form feed may stand only in strings and comments: remove it"
    if character == "'":
        return "strings are in double quotes: write \" in place of '"
    if character == "-":
        return "- may stand only in strings and comments: there are no negative numbers, and no hyphens in names"
    return f"the character {character!r} may stand only in strings and comments"


def number_at(text: str, start: int) -> Token:
    """The number that begins there, with its quantifier. Raises ScriptError."""
    stop = end_of_run(text, start, DECIMAL)
    digits = text[start:stop]
    factor = QUANTIFIERS.get(text[stop].lower(), 1)
    if factor > 1:
        stop += 1
    if text[stop] in IDENTIFIER:
        word = text[start : end_of_run(text, stop, IDENTIFIER)]
        raise ScriptError(f"{word} is no number: only K, M or G may follow the digits", start)
    if len(digits.lstrip("0")) > len(str(NUMBER_LIMIT)) or (value := int(digits) * factor) >= NUMBER_LIMIT:
        raise ScriptError(f"the number is too large: it must be below {NUMBER_LIMIT}", start)
    return Token(NUMBER, value, start, stop)


def quoted_string(text: str, start: int) -> Token:
    """The quoted string that begins there. Raises ScriptError."""
    quote = text.find('"', start + 1)
    while quote >= 0 and is_escaped(text, quote):
        quote = text.find('"', quote + 1)
    if quote < 0:
        raise ScriptError('the string does not end: add a closing "', start)
    content = text[start + 1 : quote]
    if "\\" in content:
        content = "\\".join(part.replace("\\", "") for part in content.split("\\\\"))
    return Token(STRING, content, start, quote + 1)


def is_escaped(text: str, place: int) -> bool:
    """Whether an odd number of backslashes is before that index."""
    before = place
    while text[before - 1] == "\\":
        before -= 1
    return (place - before) % 2 == 1


def multi_line(text: str, start: int, after: int) -> Token:
    """The string "text:" that begins there. after: the index after its colon. Raises ScriptError."""
    newline = text.find("\n", after)
    junk = end_of_run(text, after, frozenset(" \t"))
    if newline < 0 or (junk < newline and text[junk] != "#"):
        raise ScriptError("nothing but a comment may follow text: in its line; begin the text in the next line", junk)
    if text.startswith((".\n", ".\0"), newline + 1):
        return Token(STRING, "", start, newline + 2)
    end = text.find("\n.\n", newline)
    if end < 0:
        end = len(text) - 3
        if not text.startswith("\n.\0", end):
            raise ScriptError("the text does not end: add a line with a dot (.) and nothing else", start)
    content = text[newline:end].replace("\n..", "\n.")
    return Token(STRING, f"{content[1:]}\n", start, end + 2)


class Argument:
    """An argument. kind: TAG, NUMBER, STRING or STRINGS. value: see Token; of STRINGS the tokens."""

    __slots__ = ("kind", "start", "value")

    def __init__(self, kind: str, value: Any, start: int) -> None:
        self.kind, self.value, self.start = kind, value, start


class Node:
    """A command or a test of a script: its name, arguments, tests and block.

    start, end: where it stands in the text, without the block. after: where the next token begins. listed: whether the
    tests are in parentheses. block: None if there is none.
    """

    __slots__ = ("after", "arguments", "block", "end", "listed", "name", "start", "tests")

    def __init__(self, name: str, start: int) -> None:
        self.name, self.start = name, start
        self.end = self.after = start
        self.arguments: list[Argument] = []
        self.tests: list[Node] = []
        self.listed = False
        self.block: list[Node] | None = None


class Parser:
    """Parses a script. Source: RFC 5228 section 8.2."""

    def __init__(self, text: str) -> None:
        self._tokens = tokens_of(text)
        self._next = Token(END, "", 0, 0)
        self._last_end = 0
        self._depth = 0

    def parse(self) -> list[Node]:
        """The commands of the script. Raises ScriptError."""
        self._advance()
        commands = []
        while self._next.kind != END:
            commands.append(self._command())
        return commands

    def _advance(self) -> Token:
        """The next token, which is passed."""
        token = self._next
        self._last_end = token.end
        self._next = next(self._tokens, token)
        return token

    def _fail(self, wanted: str) -> ScriptError:
        token = self._next
        found = "the script ends" if token.kind == END else f"there is {token.value!r}"
        if token.kind == STRING:
            found = "there is a string"
        at_gap = wanted.startswith("a semicolon") and token.kind != ";"  # it is missing behind the last token
        return ScriptError(f"{wanted} must be here, but {found}", self._last_end if at_gap else token.start)

    def _command(self) -> Node:
        if self._next.kind != NAME:
            raise self._fail("the name of a command")
        node = self._node()
        if self._next.kind == "{":
            node.block = self._block()
        elif self._next.kind == ";":
            self._advance()
        else:
            raise self._fail("a block in braces { }" if node.tests else "a semicolon (;), or a block in braces { },")
        return node

    def _block(self) -> list[Node]:
        opening = self._advance()
        self._descend(opening)
        commands = []
        while self._next.kind != "}":
            if self._next.kind == END:
                raise ScriptError("the block does not end: add a closing }", opening.start)
            commands.append(self._command())
        self._advance()
        self._depth -= 1
        return commands

    def _node(self) -> Node:
        """A name with its arguments and tests."""
        name = self._advance()
        node = Node(str(name.value), name.start)
        while self._next.kind in (TAG, NUMBER, STRING, "["):
            node.arguments.append(self._argument())
        if self._next.kind == NAME:
            self._descend(self._next)
            node.tests = [self._node()]
            self._depth -= 1
        elif self._next.kind == "(":
            node.tests, node.listed = self._tests(), True
        node.end, node.after = self._last_end, self._next.start
        return node

    def _tests(self) -> list[Node]:
        """A list of tests in parentheses."""
        self._descend(self._advance())
        tests = []
        while True:
            if self._next.kind != NAME:
                raise self._fail("the name of a test")
            tests.append(self._node())
            if self._next.kind == ")":
                break
            if self._next.kind != ",":
                raise self._fail("a comma or )")
            self._advance()
        self._advance()
        self._depth -= 1
        return tests

    def _argument(self) -> Argument:
        token = self._advance()
        if token.kind != "[":
            return Argument(token.kind, token.value, token.start)
        strings = []
        while True:
            if self._next.kind != STRING:
                raise self._fail("a string in double quotes")
            strings.append(self._advance())
            if self._next.kind == "]":
                break
            if self._next.kind != ",":
                raise self._fail("a comma or ]")
            self._advance()
        self._advance()
        return Argument(STRINGS, strings, token.start)

    def _descend(self, token: Token) -> None:
        self._depth += 1
        if self._depth > BLOCKS_LIMIT:
            raise ScriptError(f"blocks and tests are nested more than {BLOCKS_LIMIT} deep", token.start)


# ======================================================================
# Sieve: matching
#
# Owns comparators, match types, and patterns.
# Must not know scripts.
# ======================================================================

REGEX_MEMORY = 1 << 19  # octets that a regular expression may take
SMALL_REGEX = 100  # instructions of an expression that is searched for fast
MARKS_LIMIT = 30  # combining characters one after the other
WILDCARD_LIMIT = 33  # match variables, ${0} among them


class Comparator:
    """A collation (RFC 4790). fold: gives a text in the form in which equal texts are the same.

    has_substrings: whether it can be used with :contains and :matches. is_slow: whether fold takes time for each
    character.
    """

    def __init__(
        self, name: str, fold: Callable[[str], str], has_substrings: bool = True, is_slow: bool = False
    ) -> None:
        self.name, self.fold, self.has_substrings, self.is_slow = name, fold, has_substrings, is_slow

    def order(self, folded: str) -> tuple[int, str]:
        """A key by which folded texts can be sorted."""
        return (0 if self.has_substrings else len(folded) or NUMBER_LIMIT), folded


def as_it_is(text: str) -> str:
    """The text itself: i;octet (RFC 4790 section 9.3)."""
    return text


def ascii_upper(text: str) -> str:
    """The text with ASCII letters in upper case: i;ascii-casemap (RFC 4790 section 9.2)."""
    if text.isascii():
        return text.upper()
    return text.encode("utf-8", "surrogateescape").upper().decode("utf-8", "surrogateescape")


def ascii_lower(text: str) -> str:
    """The text with ASCII letters in lower case."""
    if text.isascii():
        return text.lower()
    return text.encode("utf-8", "surrogateescape").lower().decode("utf-8", "surrogateescape")


def leading_number(text: str) -> str:
    """The digits at the beginning, without leading zeros; "" for infinity: i;ascii-numeric (RFC 4790 section 9.1)."""
    stop = end_of_run(f"{text}\0", 0, DECIMAL)
    return text[:stop].lstrip("0") or text[: min(stop, 1)]


def unicode_casemap(text: str) -> str:
    """The text in title case, decomposed: i;unicode-casemap (RFC 5051 section 2)."""
    if text.isascii():
        return text.upper()
    import unicodedata

    pieces, piece, marks = [], "", 0
    for character in text:
        # The time to normalize grows with the square of the marks on a letter: Unicode Standard Annex 15, section 13.
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MARKS_LIMIT:
            pieces.append(unicodedata.normalize("NFKD", piece))
            piece, marks = "", 1
        title = character.title()
        piece += title if len(title) == 1 else character
    return "".join([*pieces, unicodedata.normalize("NFKD", piece)])


COMPARATORS = {
    "i;octet": Comparator("i;octet", as_it_is),
    "i;ascii-casemap": Comparator("i;ascii-casemap", ascii_upper),
    "i;ascii-numeric": Comparator("i;ascii-numeric", leading_number, has_substrings=False),
    "i;unicode-casemap": Comparator("i;unicode-casemap", unicode_casemap, is_slow=True),
}
BASE_COMPARATORS = ("i;octet", "i;ascii-casemap")  # those that every script may use
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {  # RFC 5231 section 4
    "gt": lambda value, key: value > key,
    "ge": lambda value, key: value >= key,
    "lt": lambda value, key: value < key,
    "le": lambda value, key: value <= key,
    "eq": lambda value, key: value == key,
    "ne": lambda value, key: value != key,
}


class Glob:
    """A pattern of :matches, in which * stands for any text, ? for one character, and \\ takes both literally.

    The text is divided at each *, so that no character is looked at for a second * again: * takes as little as it can,
    and the earliest place for what follows it is always right. has_single: whether it has a ?.
    Source: RFC 5228 section 2.7.1, RFC 5229 section 3.2.
    """

    def __init__(self, pattern: str) -> None:
        self._segments: list[list[str]] = [[""]]  # between each * the literals between each ?
        literals = self._segments[0]
        place, end = 0, len(pattern)
        while place < end:
            stop = first_of("*?\\", pattern, place)
            literals[-1] += pattern[place:stop]
            special, after = pattern[stop : stop + 1], stop + 1
            if special == "*":
                literals = [""]
                self._segments.append(literals)
            elif special == "?":
                literals.append("")
            elif special:  # a backslash at the end stands for itself
                literals[-1] += pattern[after : after + 1] or special
                after += 1
            place = after
        self._lengths = [sum(map(len, each)) + len(each) - 1 for each in self._segments]
        self.has_single = any(len(each) > 1 for each in self._segments)

    def spans(self, text: str, spend: Callable[[int], None]) -> list[tuple[int, int]] | None:
        """Where the wildcards begin and end in the text, in the order of the pattern; None if it does not match.

        spend: is told the work that is done, and may raise.
        """
        last = len(self._segments) - 1
        if len(text) < sum(self._lengths) or (not last and len(text) > self._lengths[0]):
            return None
        found: list[tuple[int, int]] = []
        place = 0
        for number, (literals, length) in enumerate(zip(self._segments, self._lengths)):
            start = place
            if number == last:
                start = len(text) - length
            elif number:
                start = self._find(literals, length, text, place, spend)
            if start < place or not self._is_at(literals, text, start):
                return None
            if number:
                found.append((place, start))
            for literal in literals[:-1]:
                start += len(literal)
                found.append((start, start + 1))
                start += 1
            place = start + len(literals[-1])
        return found

    def _is_at(self, literals: Sequence[str], text: str, start: int) -> bool:
        for literal in literals:
            if not text.startswith(literal, start):
                return False
            start += len(literal) + 1
        return True

    def _find(self, literals: Sequence[str], length: int, text: str, start: int, spend: Callable[[int], None]) -> int:
        """The first index from start on where the segment is; -1 if there is none."""
        longest = max(literals, key=len)
        before = sum(len(literal) + 1 for literal in literals[: literals.index(longest)])
        while (place := text.find(longest, start + before) - before) >= start:
            if len(text) - place < length:
                break
            if self._is_at(literals, text, place):
                return place
            spend(len(literals))
            start = place + 1
        return -1


def as_latin_1(text: str) -> str:
    """The octets of the text in UTF-8, each as a character."""
    return text.encode("utf-8", "surrogateescape").decode("latin-1")


def from_latin_1(text: str) -> str:
    """The text that as_latin_1() was given."""
    return text.encode("latin-1").decode("utf-8", "surrogateescape")


def regex_of(pattern: str, ignores_case: bool) -> Any:
    """A compiled regular expression of RE2, POSIX extended and leftmost-longest. Raises ValueError."""
    import re2  # type: ignore[import-untyped]

    options = re2.Options()
    options.posix_syntax = options.longest_match = options.dot_nl = True
    options.word_boundary = options.perl_classes = False
    options.case_sensitive = not ignores_case
    options.log_errors = False
    options.max_mem = REGEX_MEMORY
    try:
        return re2.compile(pattern.encode("utf-8", "surrogateescape"), options)
    except re2.error as error:
        cause = error.args[0] if error.args else error
        text = cause.decode("utf-8", "replace") if isinstance(cause, bytes) else str(cause)
        raise ValueError(f"{pattern!r} is not a regular expression: {text}") from None


def work_of_regex(regex: Any, octets: bytes) -> int:
    """The steps that a search takes at worst: a large expression is not run as an automaton of its states."""
    size: int = regex.programsize
    return 1 + (len(octets) // 8 if size <= SMALL_REGEX else len(octets) * size // 64)


def has_regex() -> bool:
    """Whether regular expressions can be used: whether the package google-re2 is there."""
    # importlib.util.find_spec() would do the same, but takes longer to import than a message to deliver.
    return any(finder.find_spec("re2", None) for finder in sys.meta_path)


def in_source(text: str, fold: Callable[[str], str], spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of a text, given those of its folded form, which has another length."""
    from bisect import bisect_right

    ends = list(itertools.accumulate(len(fold(character)) for character in text))
    return [(bisect_right(ends, start), bisect_right(ends, end)) for start, end in spans]


def parts_of_match(value: str, spans: Iterable[tuple[int, int]]) -> list[str]:
    """The match variables after a match: the whole value, and what the wildcards stand for."""
    return [value, *(value[start:end] for start, end in itertools.islice(spans, WILDCARD_LIMIT - 1))]


# ======================================================================
# Sieve: actions
#
# Owns what the scripts for a message have decided so far: copies, implicit keep,
# what is sent.
# Must not know how it is done.
# ======================================================================

ACTION_LIMIT = 32  # actions of a message
REDIRECT_LIMIT = 4  # redirects of a message
SENDING_ORDER = ("redirect", "reject", "vacation", "notify")
ERROR_LIMIT = 500  # characters of the text of an error


class RunError(Exception):
    """The script cannot go on. text: why. script, line: where, once Run.execute() has set it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text, self.script, self.line = text[:ERROR_LIMIT], "", 0


class Actions:
    """The actions of the scripts for a message. default_folder: the directory of the folder where a keep goes.

    Each script hands the message on to the next while keeps is true at its end.
    """

    def __init__(self, default_folder: str) -> None:
        self._default_folder = default_folder
        self._filings: dict[str, Filing] = {}
        self._kept: Filing | None = None  # by the explicit keep of the present script
        self._handed: Filing | None = None  # by that of the script before it
        self._keeps_implicitly = True
        self._flags_before: Sequence[str] = ()
        self._filed = 0  # copies, those that others have replaced among them
        self._outgoing: list[Outgoing] = []
        self.rejection: str | None = None
        self._answers_here = False  # whether the present script has answered
        self._taken_here: list[str] = []  # by which commands the present script has taken the message

    def begin_script(self, flags: Sequence[str]) -> Actions:
        """The next script begins, with these flags in the internal variable; what to go back to if it fails."""
        self.fall_back()
        self._flags_before = tuple(flags)
        self._answers_here, self._taken_here = False, []
        before = Actions(self._default_folder)
        before.__dict__.update(self.__dict__, _filings=dict(self._filings), _outgoing=list(self._outgoing))
        return before

    def fall_back(self) -> None:
        """Puts the implicit keep into effect, for the next script cannot run."""
        self._handed, self._kept, self._keeps_implicitly = self._kept or self._handed, None, True

    @property
    def keeps(self) -> bool:
        """Whether a keep is in effect: an explicit one of the last script, or the implicit one."""
        return self._keeps_implicitly or self._kept is not None

    def filings(self, flags: Sequence[str], header: Header | None) -> list[Filing]:
        """All copies, once the last script has ended. A folder that is named twice gets one, the later one.

        flags, header: for the implicit keep.
        """
        filings = dict(self._filings)
        if self.keeps:
            kept = self._kept or self._implicit_filing(flags, header)
            earlier = filings.get(kept.folder)
            if not earlier or earlier.number < kept.number:
                filings[kept.folder] = kept
        return list(filings.values())

    def file(self, folder: str, flags: Sequence[str], header: Header | None, copy: bool) -> None:
        """Files a copy, and cancels the implicit keep unless copy is set. Raises RunError."""
        self._check_rejection("fileinto")
        self._taken_here.append("fileinto")
        self._filings[folder] = filing = self._filing(folder, flags, header)
        filing.is_named = True
        self._keeps_implicitly = self._keeps_implicitly and copy
        self._check_number()

    def keep(self, flags: Sequence[str], header: Header | None) -> None:
        """Keeps the message. If another script follows, that one decides. Raises RunError."""
        self._kept = self._filing(self._default_folder, flags, header)
        self._check_number()

    def discard(self) -> None:
        """Cancels the implicit keep."""
        self._keeps_implicitly = False

    def redirect(self, mail: Outgoing, copy: bool) -> None:
        """Sends the message on, and cancels the implicit keep unless copy is set. Raises RunError."""
        self._check_rejection("redirect")
        self._taken_here.append("redirect")
        self._keeps_implicitly = self._keeps_implicitly and copy
        self.send(mail)
        if sum(each.action == "redirect" for each in self._outgoing) > REDIRECT_LIMIT:
            raise RunError(f"there are more than {REDIRECT_LIMIT} redirects")

    def reject(self, reply: str, report: Outgoing | None) -> None:
        """Rejects the message, by the text of a reply or by a report. What scripts before have taken stays so.

        Raises RunError. Source: RFC 5429 section 2.4.
        """
        self._check_rejection("reject")
        answers = [each.action for each in self._outgoing if each.action == "vacation" and not each.withheld]
        if conflicts := [*self._taken_here, *answers]:
            raise RunError(f"reject cannot stand beside {conflicts[0]}: the message would be taken and refused")
        self._keeps_implicitly, self.rejection = False, reply
        if report:
            self.send(report)

    def has_answered(self) -> bool:
        """Whether an answer has been decided on.

        Raises RunError if the present script has done it: RFC 5230 section 4.7.
        """
        self._check_rejection("vacation")
        if self._answers_here:
            raise RunError("vacation: a script can answer a message only once")
        self._answers_here = True
        return any(each.action == "vacation" and each.withheld in ("", ANSWERED_LATELY) for each in self._outgoing)

    def send(self, mail: Outgoing) -> None:
        """Sends mail; of two with the same record the first counts. Raises RunError."""
        if not any((each.action, each.record) == (mail.action, mail.record) for each in self._outgoing):
            self._outgoing.append(mail)
        self._check_number()

    def outgoing(self) -> list[Outgoing]:
        """What is to be sent, in the order in which it is: what must not be lost comes first."""
        return sorted(self._outgoing, key=lambda mail: SENDING_ORDER.index(mail.action))

    def _check_rejection(self, action: str) -> None:
        if self.rejection is not None:
            raise RunError(f"{action} cannot stand beside reject: the message would be taken and refused")

    def _check_number(self) -> None:
        if len(self._filings) + len(self._outgoing) + (self._kept is not None) > ACTION_LIMIT:
            raise RunError(f"there are more than {ACTION_LIMIT} actions")

    def _implicit_filing(self, flags: Sequence[str], header: Header | None) -> Filing:
        """The copy of the implicit keep, with the flags of the keep of a script before if the last has not set any."""
        kept = self._filing(self._default_folder, flags, header)
        handed = self._handed
        if handed and tuple(flags) == self._flags_before:
            kept.flags = handed.flags
        kept.number = handed.number if handed else 0  # a fileinto that names the folder decides
        return kept

    def _filing(self, folder: str, flags: Sequence[str], header: Header | None) -> Filing:
        self._filed += 1
        return Filing(folder, tuple(flags), header, self._filed)


# ======================================================================
# Sieve: runs
#
# Owns one run of a script: the message as the script sees it, variables, flags,
# limits.
# Must not know commands and tests, files, the wire.
# ======================================================================

INCLUDE_LIMIT = 10  # how deep scripts may include each other
STEP_LIMIT = 5_000_000  # work of a run; a step takes about a fifth of a microsecond
STEP_OCTETS = 256  # characters that are compared in one step
COMMAND_STEPS = 5  # what a command costs
REGEX_STEPS = 2000  # what it costs to compile a regular expression
FIELD_STEPS = 10  # what it costs to look for a field
PART_STEPS = 20  # what it costs to go to another part
LOOKUP_STEPS = 500  # what it costs to look for a folder or a record
INCLUDE_STEPS = 1000  # what it costs to look for an included script
INCLUDED_STEPS = 3  # what each of its characters costs
VARIABLE_LIMIT = 16_384  # characters of a variable's value
EXPANSION_LIMIT = 65_536  # characters of a string with its variables
VARIABLES_LIMIT = 256  # variables of a script
HELD_LIMIT = 2_000_000  # characters of the variables of scripts that wait for one that they include
NAME_LENGTH_LIMIT = 64  # characters of a variable's name
TEXT_LIMIT = 1 << 20  # octets of a part's content that tests look at
TEXTS_LIMIT = 1 << 21  # octets of all the texts of a message that the test body looks at
HEADER_GROWTH = 1 << 17  # octets that a run may add to a header
FLAG_LIMIT = 128  # flags of a message
RECORDS_LIMIT = 32  # records that the scripts for a message make
KEYWORD_LENGTH_LIMIT = 50  # octets of a keyword, as in Dovecot's setting mail_max_keyword_length
MEMO_LIMIT = 1024  # characters of a text, and texts, that are kept in the form in which they are compared


class ScriptEnd(Exception):
    """The script ends here, as it wants."""


class Return(Exception):
    """The included script ends here."""


class Break(Exception):
    """A loop ends here. name: that of the loop; "" for the innermost."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Script:
    """A script that can be run. name: its path. text: its source. block: runs it."""

    def __init__(self, name: str, text: str, block: Step) -> None:
        self.name, self.text, self.block = name, text, block

    def line_of(self, place: int) -> int:
        """The number of the line that has the character with that index."""
        return self.text.count("\n", 0, place) + 1


class Subject:
    """The message as a script sees it. header: its header, as far as the script has changed it.

    is_changed: whether it has. spend: is told the work that is done, and may raise RunError. part: the part that
    foreverypart is at; None outside of such a loop.
    Names of fields are given in lower case.
    """

    def __init__(self, message: Message) -> None:
        self.message, self.header = message, message.header
        self.spend: Callable[[int], None] = lambda _: None
        self.is_changed = False
        self.part: Part | None = None
        self._root: Part | None = None
        self._values: dict[str, list[str]] = {}
        self._remembered: dict[tuple[str, ...], list[str]] = {}
        self._texts: list[str] = []
        self._latest: tuple[Part | None, str] = None, ""
        self._unread: Iterator[Part] = self._walk()
        self._room = TEXTS_LIMIT

    def close(self) -> None:
        """Frees what has been read; no test must follow.

        Generators and parts refer to each other, and would keep it until the interpreter looks for garbage.
        """
        self._values, self._remembered, self._texts, self._latest = {}, {}, [], (None, "")
        self._unread, self._root, self.part = iter(()), None, None

    @property
    def root(self) -> Part:
        """The whole message as a part."""
        if self._root is None:
            self._root = whole(self.message)
        return self._root

    def _walk(self) -> Iterator[Part]:
        yield from self.root.walk()

    def here(self) -> Part:
        """The part at hand: that of the innermost foreverypart, else the whole message."""
        return self.part or self.root

    def header_of(self, part: Part) -> Header:
        """The header of a part, as far as the script has changed it."""
        return self.header if part is self._root else part.header

    def texts(self) -> Iterator[str]:
        """The text of each part that has text, without markup; each part is read once, and not before it is needed.

        TEXT_LIMIT octets of each part, and TEXTS_LIMIT of all.
        """
        number = 0
        while number < len(self._texts) or self._read_text():
            yield self._texts[number]
            number += 1

    def _read_text(self) -> bool:
        """Reads the text of the next part that has text. False if there is none."""
        for part in self._unread:
            self.spend(PART_STEPS)
            if part.content_type.type == "text":
                content = part.content(min(TEXT_LIMIT, self._room))
                self._room -= len(content)
                self._texts.append(part.text_of(content))
                return True
        return False

    def text_of(self, part: Part) -> str:
        """The text of a part, TEXT_LIMIT octets at most."""
        if self._latest[0] is not part:
            content = part.content(TEXT_LIMIT)
            self.spend(1 + len(content) // 2)
            self._latest = part, part.text_of(content)
        return self._latest[1]

    def bodies(self, name: str, header: Header | None = None) -> list[bytes]:
        """The bodies of all fields with that name, as they are; in the header of a part if that is given."""
        header = header or self.header
        self.spend(FIELD_STEPS + len(header.octets) // STEP_OCTETS)
        if not is_field_name(name):  # such a name is no error, but matches nothing: RFC 5228 section 2.4.2.2
            return []
        found = [header.octets[start:end].partition(b":")[2] for start, end in header.spans(name.encode())]
        self.spend(2 * len(found))
        return found

    def has_field(self, name: str, header: Header | None = None) -> bool:
        """Whether there is a field with that name; in the header of a part if that is given."""
        header = header or self.header
        self.spend(FIELD_STEPS + len(header.octets) // STEP_OCTETS)
        return is_field_name(name) and next(header.spans(name.encode()), None) is not None

    def values(self, name: str) -> list[str]:
        """The decoded values of all fields with that name."""
        if (found := self._values.get(name)) is None:
            bodies = self.bodies(name)
            self.spend(sum(map(len, bodies)) // 16)
            found = self._values[name] = [unstructured(body) for body in bodies]
        return found

    def remembered(self, what: tuple[str, ...], read: Callable[[], list[str]]) -> list[str]:
        """What a function reads in the header, which is read once until the header changes. what: names it."""
        if (found := self._remembered.get(what)) is None:
            found = self._remembered[what] = read()
        return found

    def add_field(self, name: str, value: str, last: bool) -> None:
        """Adds a field at the end of the header, or at its beginning after the trace of this delivery."""
        octets = self.header.octets
        field = folded_field(name, value)
        if len(octets) + len(field) > len(self.message.header.octets) + HEADER_GROWTH:
            raise RunError(f"addheader makes the header more than {HEADER_GROWTH} bytes longer")
        if last and not octets.endswith(LF):
            octets += LF
        place = len(octets) if last else end_of_trace(self.header)
        self.set_header(Header(octets[:place] + field + octets[place:]))

    def remove_fields(self, spans: Iterable[tuple[int, int]]) -> None:
        """Removes the fields at these places of the header."""
        kept, after = [], 0
        for start, end in spans:
            kept.append(self.header.octets[after:start])
            after = end
        if kept:
            self.set_header(Header(b"".join([*kept, self.header.octets[after:]])))

    def set_header(self, header: Header) -> None:
        """Puts another header in place of that which the script sees."""
        self.header, self.is_changed = header, header is not self.message.header
        self._values.clear()
        self._remembered.clear()


def addresses_in(body: bytes) -> list[Address]:
    """The addresses in the body of a field; one that has no domain if it cannot be understood, or is empty."""
    found = [Address(local, domain) for _, local, domain in mailboxes_of(body)]
    has_none = b";" in body or b"<>" in body  # an empty group, or the null address
    return found if found or has_none else [Address(raw_text(body), "")]


def end_of_trace(header: Header) -> int:
    """The index after the fields that this delivery has put before the message: Return-Path to Received."""
    for name in (b"received", b"return-path"):
        for _, end in header.spans(name):
            return end
    return 0


if TYPE_CHECKING:

    class Surroundings(Protocol):
        """What a run may ask. Names of folders are those that people write."""

        config: Config
        reverse_path: Address | None
        recipient: Recipient
        default_folder: str  # the directory of the folder where a keep goes

        def folder(self, name: str) -> str:
            """The directory of a folder, existing or not. Raises ValueError if no folder can have that name."""

        def has_folder(self, name: str) -> bool:
            """Whether the folder exists."""

        def special_folder(self, use: str) -> str | None:
            """The name of the existing folder with that special use; None if there is none. Source: RFC 8579."""

        def script(self, place: str, name: str) -> Script | None:
            """The script to include, from the place "personal" or "global"; None if it is missing. Raises RunError."""

        def has_seen(self, record: str) -> bool:
            """Whether that record is in the database."""

        def environment(self, item: str) -> str | None:
            """What is known about this host and connection; None for an unknown item. Source: RFC 5183."""

        def score(self, subject: Subject, of: str, best: int) -> str | None:
            """What a check for "spam" or "virus" has found, up to best; None without a check. Source: RFC 5235."""


class Budget:
    """The work that a run may do."""

    def __init__(self) -> None:
        self._steps = STEP_LIMIT

    def spend(self, steps: int) -> None:
        """Counts work. Raises RunError when there has been too much of it."""
        self._steps -= steps
        if self._steps < 0:
            raise RunError("the script does too much work for this message")


class FoldedTexts:
    """Texts in the form in which comparators compare them. spend: see Subject."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend
        self._short: dict[str, dict[str, str]] = {name: {} for name in COMPARATORS}
        self._long = "", "", ""  # the latest: a comparator, a text, and its form

    def of(self, text: str, comparator: Comparator) -> str:
        """The text in the form in which the comparator compares it. Raises RunError."""
        short = self._short[comparator.name]
        if (folded := short.get(text)) is None:
            is_short = len(text) < MEMO_LIMIT
            if not is_short and self._long[:2] == (comparator.name, text):
                return self._long[2]
            self._spend(work_of_folding(text, comparator))
            folded = comparator.fold(text)
            if not is_short:
                self._long = comparator.name, text, folded
            elif len(short) < MEMO_LIMIT:
                short[text] = folded
        return folded


def work_of_folding(text: str, comparator: Comparator) -> int:
    """The steps that it takes to bring a text into the form in which it is compared."""
    return len(text) if comparator.is_slow and not text.isascii() else 1 + len(text) // STEP_OCTETS


class Run:
    """A run of scripts, one after the other, with those that they include.

    actions: what the scripts have decided so far. variables: the present script's. matched: the match variables. flags:
    the internal variable of imap4flags. records: what to record once all is stored, with the seconds to keep it. place:
    the index in the present script. report: is told each test with its result, for a person; None if nobody asks.
    spend: see Budget. folded: see FoldedTexts.of().
    """

    def __init__(self, subject: Subject, around: Surroundings) -> None:
        self.subject, self.around = subject, around
        self.spend = subject.spend = Budget().spend
        self.script: Script | None = None
        self.variables: dict[str, str] = {}
        self.shared_variables: dict[str, str] = {}
        self.matched: list[str] = []
        self.flags: list[str] = []
        self.actions = Actions(around.default_folder)
        self.records: dict[str, int] = {}
        self.started = time.time()
        self.place = 0
        self.report: Callable[[Script, int, str], None] | None = None
        self.folded = FoldedTexts(self.spend).of
        self._included: set[str] = set()
        self._including: list[str] = []
        self._held = 0  # characters in the variables of the scripts that include the present one

    def execute(self, script: Script) -> None:
        """Runs a script to its end. Raises RunError.

        After an error the actions of the scripts before are still there, and a keep is in effect.
        """
        records, header, flags = dict(self.records), self.subject.header, list(self.flags)
        before = self.actions.begin_script(flags)
        self.script, self.variables, self.matched, self.place = script, {}, [], 0
        self._included.add(script.name)
        self._including, self._held = [], 0
        try:
            self._run_block(script)
        except (ScriptEnd, Return):
            return
        except RunError:
            self.actions, self.records, self.flags = before, records, flags
            self.subject.set_header(header)
            raise

    def changed_header(self) -> Header | None:
        """The header of now; None if it is the message's own."""
        return self.subject.header if self.subject.is_changed else None

    def include(self, script: Script, once: bool) -> None:
        """Runs an included script, unless it has been included before and that is not wanted twice.

        Raises RunError and ScriptEnd. Source: RFC 6609 section 3.2.
        """
        if once and script.name in self._included:
            return
        if script.name in self._including or (self.script and script.name == self.script.name):
            raise RunError(f"include: {script.name} includes itself")
        if len(self._including) >= INCLUDE_LIMIT:
            raise RunError(f"include: scripts include each other more than {INCLUDE_LIMIT} deep")
        self.spend(INCLUDED_STEPS * len(script.text))
        self._included.add(script.name)
        self._including.append(script.name)
        before = self.script, self.variables, self.matched, self.place
        held = sum(map(len, self.variables.values()))
        self._held += held
        if self._held > HELD_LIMIT:
            raise RunError(f"include: the variables of the scripts have more than {HELD_LIMIT} characters")
        self.script, self.variables, self.matched = script, {}, []
        try:
            self._run_block(script)
        except Return:
            pass
        self._including.pop()
        self._held -= held
        self.script, self.variables, self.matched, self.place = before

    def _run_block(self, script: Script) -> None:
        """Runs the commands of a script. Errors get the place where the run is."""
        try:
            script.block(self)
        except RecursionError:
            raise self._located(RunError("blocks and included scripts are nested too deep")) from None
        except RunError as error:
            raise self._located(error) from None

    def spend_on(self, *texts: str) -> None:
        """Counts work that takes time in proportion to the length of texts. Raises RunError."""
        self.spend(1 + sum(map(len, texts)) // STEP_OCTETS)

    def billed(self, texts: list[str]) -> list[str]:
        """The texts, with the work counted that it takes to divide them into words. Raises RunError."""
        self.spend(1 + sum(map(len, texts)) // 2)
        return texts

    def look_up(self) -> Surroundings:
        """What may be asked for a folder or a record, with the work for that counted. Raises RunError."""
        self.spend(LOOKUP_STEPS)
        return self.around

    def remember(self, record: str, seconds: int) -> None:
        """Makes a record, once all is stored, for so many seconds. Raises RunError."""
        if record not in self.records and len(self.records) >= RECORDS_LIMIT:
            raise RunError(f"there are more than {RECORDS_LIMIT} records of duplicates")
        self.records[record] = seconds

    def set_variable(self, name: str, value: str, is_shared: bool) -> None:
        """Sets a variable, cut at VARIABLE_LIMIT: RFC 5229 section 6 wants that, and no error. Raises RunError."""
        self.spend_on(value)
        variables = self.shared_variables if is_shared else self.variables
        if name not in variables and len(variables) >= VARIABLES_LIMIT:
            raise RunError(f"there are more than {VARIABLES_LIMIT} variables")
        variables[name] = value[:VARIABLE_LIMIT]

    def _located(self, error: RunError) -> RunError:
        """The error with the place where the run is, unless it has one."""
        if not error.script and self.script:
            error.script, error.line = self.script.name, self.script.line_of(self.place)
        return error


def words_of(lists: Iterable[str]) -> list[str]:
    """The words of texts in which spaces divide them, as they divide flags (RFC 5232 section 2)."""
    return [word for text in lists for word in text.split(" ") if word]


def normalized_flags(lists: Iterable[str]) -> list[str]:
    """The flags in texts with spaces between them, each once, without those that no client may set.

    Source: RFC 5232 section 2.
    """
    flags: dict[str, str] = {}
    for flag in words_of(lists):
        if is_flag(flag) and len(flags) < FLAG_LIMIT:
            flags.setdefault(flag.lower(), flag)
    return list(flags.values())


def is_flag(flag: str) -> bool:
    """Whether a message can have that flag or keyword."""
    if flag.startswith("\\"):
        return flag.lower() in FLAG_LETTERS
    return 0 < len(flag) <= KEYWORD_LENGTH_LIMIT and KEYWORD_ATOM.issuperset(flag)


class Template:
    """A string with variables. parts: literals, and between them functions that give a variable's value.

    source: as the script has it.
    """

    def __init__(self, parts: Sequence[str | Callable[[Run], str]], source: str) -> None:
        self._parts, self.source = parts, source

    def expand(self, run: Run) -> str:
        """The string with the values of the variables, cut at EXPANSION_LIMIT. Raises RunError."""
        pieces, room = [], EXPANSION_LIMIT
        for part in self._parts:
            run.spend(1)
            pieces.append((part if isinstance(part, str) else part(run))[:room])
            room -= len(pieces[-1])
        run.spend((EXPANSION_LIMIT - room) // STEP_OCTETS)
        return "".join(pieces)


def expanded(text: Text, run: Run) -> str:
    """The value of a string argument."""
    return text if isinstance(text, str) else text.expand(run)


class Matcher:
    """Compares values with keys. match: "is", "contains", "matches", "regex", "value" or "count".

    relation: of :value and :count. captures: whether a match sets the match variables. split: makes keys of the strings
    in the script. Source: RFC 5228 section 2.7.
    """

    def __init__(
        self,
        match: str,
        comparator: Comparator,
        keys: Sequence[Text],
        relation: str,
        captures: bool,
        split: Callable[[Iterable[str]], list[str]] = list,
    ) -> None:
        self.match, self._comparator, self._keys, self._captures = match, comparator, keys, captures
        self._relation, self._split = RELATIONS[relation], split
        self._fixed: list[Any] | None = None
        if not any(isinstance(key, Template) for key in keys):
            self._fixed = [self._prepared(key) for key in split(map(str, keys))]
        self._accepts: Callable[[Run, str, list[Any]], bool] = getattr(self, f"_accepts_{match}")

    def accepts(self, run: Run, values: Iterable[str]) -> bool:
        """Whether one of the values matches one of the keys. With :count, their number is compared. Raises RunError."""
        keys = self._fixed
        if keys is None:
            texts = self._split(expanded(key, run) for key in self._keys)
            for text in texts:
                run.spend(work_of_folding(text, self._comparator))
            if self.match == "regex":
                run.spend(REGEX_STEPS * len(texts) + 50 * sum(map(len, texts)))
            try:
                keys = [self._prepared(text) for text in texts]
            except ValueError as error:
                raise RunError(str(error)) from None
        if self.match == "count":
            number = 0
            for _ in values:
                run.spend(1)
                number += 1
            values = (str(number),)
        accepts = self._accepts
        for value in values:  # noqa: SIM110 (a generator takes longer, and this is the innermost loop)
            if accepts(run, value, keys):
                return True
        return False

    def _prepared(self, key: str) -> Any:
        """A key in the form that the match type needs. Raises ValueError."""
        if self.match == "regex":
            return regex_of(key, ignores_case=self._comparator.name != "i;octet")
        folded = self._comparator.fold(key)
        if self.match == "matches":
            glob = Glob(folded)
            # A character is an octet for these: RFC 5228 section 2.7.1.
            by_octets = glob.has_single and self._comparator.name in BASE_COMPARATORS
            return glob, Glob(as_latin_1(folded)) if by_octets else None
        return self._comparator.order(folded) if self.match in ("value", "count") else folded

    def _accepts_is(self, run: Run, value: str, keys: list[Any]) -> bool:
        run.spend(len(keys))
        return run.folded(value, self._comparator) in keys

    def _accepts_contains(self, run: Run, value: str, keys: list[Any]) -> bool:
        folded = run.folded(value, self._comparator)
        run.spend(len(keys) * (1 + len(folded) // STEP_OCTETS))
        return any(map(folded.__contains__, keys))

    def _accepts_value(self, run: Run, value: str, keys: list[Any]) -> bool:
        run.spend(len(keys))
        order = self._comparator.order(run.folded(value, self._comparator))
        return any(self._relation(order, key) for key in keys)

    _accepts_count = _accepts_value

    def _accepts_matches(self, run: Run, value: str, keys: list[Any]) -> bool:
        folded = run.folded(value, self._comparator)
        run.spend(len(keys) * (1 + len(folded) // STEP_OCTETS))
        for key, of_octets in keys:
            by_octets = of_octets and not folded.isascii()
            glob, text, whole_text = (
                (of_octets, *map(as_latin_1, (folded, value))) if by_octets else (key, folded, value)
            )
            if (spans := glob.spans(text, run.spend)) is not None:
                if self._captures:
                    if len(whole_text) != len(text):
                        run.spend(len(whole_text))
                        spans = in_source(whole_text, self._comparator.fold, spans)
                    parts = parts_of_match(whole_text, spans)
                    run.matched = list(map(from_latin_1, parts)) if by_octets else parts
                return True
        return False

    def _accepts_regex(self, run: Run, value: str, keys: list[Any]) -> bool:
        octets = value.encode("utf-8", "surrogateescape")
        for key in keys:
            run.spend(work_of_regex(key, octets))
            if match := key.search(octets):
                if self._captures:
                    groups = [match.group(0), *match.groups()][:WILDCARD_LIMIT]
                    run.matched = [(group or b"").decode("utf-8", "surrogateescape") for group in groups]
                return True
        return False


# ======================================================================
# Sieve: language
#
# Owns the rows of the language's table, and the checker, which makes a script
# that can be run out of a tree.
# Must not know which commands and tests there are.
# ======================================================================

REGEXES_LIMIT = 200  # regular expressions in a script
ERRORS_LIMIT = 20  # errors of a script that are told
SIMILAR = 0.7  # how similar a misspelt word is to the one that was meant, by difflib
DEFAULT_COMPARATOR = "i;ascii-casemap"
IMPLIED = {"spamtestplus": "spamtest", "vacation-seconds": "vacation"}  # RFC 5235 section 2.3, RFC 6131 section 2


class Tag:
    """A row for a tag. value: the kind of the argument that follows it; "" for none.

    group: only one tag of a group may be given. capability: what must be required for it; "" for nothing.
    """

    def __init__(self, name: str, capability: str = "", value: str = "", group: str = "") -> None:
        self.name, self.capability, self.value, self.group = name, capability, value, group or name


class Word:
    """A row for a command or a test.

    name: as scripts have it. capability: what must be required for it; "" for nothing. arguments: the kinds of those
    without a tag. compiled: gives what runs it. optional: how many of the first arguments may be missing. tests: how
    many tests follow: 0, 1, or MANY. has_block: whether a block follows.
    """

    def __init__(
        self,
        name: str,
        capability: str,
        arguments: Sequence[str],
        compiled: Callable[[Call], Any],
        tags: Sequence[Tag] = (),
        optional: int = 0,
        tests: int = 0,
        has_block: bool = False,
    ) -> None:
        self.name, self.capability, self.arguments, self.compiled = name, capability, arguments, compiled
        self.tags = {tag.name: tag for tag in tags}
        self.optional, self.tests, self.has_block = optional, tests, has_block


MANY = -1


class Language:
    """The commands and tests that there are. capabilities: those that scripts may require."""

    def __init__(self, commands: Sequence[Word], tests: Sequence[Word], capabilities: Iterable[str]) -> None:
        self.commands = {word.name: word for word in commands}
        self.tests = {word.name: word for word in tests}
        self.capabilities = frozenset(capabilities)


class ScriptErrors(Exception):
    """A script has errors. errors: each as (line, column, text), in order. name: the script's path."""

    def __init__(self, errors: Iterable[ScriptError], text: str, name: str) -> None:
        super().__init__()
        self.name = name
        ordered = sorted(errors, key=lambda error: error.place)[:ERRORS_LIMIT]
        self.errors = [
            (text.count("\n", 0, each.place) + 1, each.place - text.rfind("\n", 0, each.place), each.text[:ERROR_LIMIT])
            for each in ordered
        ]

    def __str__(self) -> str:
        return "; ".join(f"line {line}, column {column}: {text}" for line, column, text in self.errors)


class Call:
    """A command or a test of a script with its arguments in order, for the function that compiles it.

    node: the place in the tree. compiler: for blocks and tests.
    """

    def __init__(self, node: Node, word: Word, compiler: Compiler) -> None:
        """Raises ScriptError for arguments that do not fit."""
        self.node, self.word, self.compiler = node, word, compiler
        self._tags: dict[str, Argument] = {}
        self._tag_places: dict[str, int] = {}
        self._positional: list[Argument | None] = []
        arguments = iter(node.arguments)
        for argument in arguments:
            if argument.kind == TAG:
                self._take_tag(argument, arguments)
            else:
                self._positional.append(argument)
        self._check_positional()

    def has(self, tag: str) -> bool:
        """Whether the tag is given."""
        return tag in self._tags

    def given(self, argument: int) -> bool:
        """Whether an optional argument is given."""
        return self._positional[argument] is not None

    def first_of(self, *tags: str) -> str:
        """The first of these tags that is given, without its colon; "" for none."""
        return next((tag[1:] for tag in tags if tag in self._tags), "")

    def place_of(self, argument: int | str) -> int:
        """Where an argument, a tag or its value stands."""
        found = self._tags[argument] if isinstance(argument, str) else self._positional[argument]
        return found.start if found else self.node.start

    def number(self, tag: str) -> int | None:
        """The number of a tag; None if it is not given."""
        return self._tags[tag].value if tag in self._tags else None

    def strings(self, argument: int | str) -> list[tuple[Text, int]]:
        """The strings of an argument, or of a tag, each with its place; [] if it is not given. Raises ScriptError."""
        found = self._tags.get(argument) if isinstance(argument, str) else self._positional[argument]
        if not found:
            return []
        tokens = found.value if found.kind == STRINGS else [found]
        return [(self.compiler.text(str(token.value), token.start), token.start) for token in tokens]

    def texts(self, argument: int | str) -> list[Text]:
        """The strings of an argument, or of a tag; [] if it is not given. Raises ScriptError."""
        return [text for text, _ in self.strings(argument)]

    def text(self, argument: int | str) -> Text | None:
        """The string of an argument, or of a tag; None if it is not given. Raises ScriptError."""
        return next(iter(self.texts(argument)), None)

    def constants(self, argument: int | str) -> list[tuple[str, int]]:
        """The strings of an argument in which no variable may be, each with its place. Raises ScriptError."""
        constants = []
        for text, place in self.strings(argument):
            if isinstance(text, Template):
                raise ScriptError(f"a variable cannot stand here: write the value in place of {text.source}", place)
            constants.append((text, place))
        return constants

    def constant(self, argument: int | str) -> str:
        """The string of an argument in which no variable may be; "" if it is not given. Raises ScriptError."""
        return next((text for text, _ in self.constants(argument)), "")

    def fixed(self, argument: int | str) -> list[str] | None:
        """The strings of an argument; None if they have variables. Raises ScriptError."""
        texts = self.texts(argument)
        return [str(text) for text in texts] if not any(isinstance(text, Template) for text in texts) else None

    def field_name(self, argument: int | str) -> Text:
        """The name of a header field in an argument. Raises ScriptError for one that is none."""
        strings = self.strings(argument)
        if len(strings) != 1:
            raise ScriptError(f"{self.node.name} needs one name of a header field", self.place_of(argument))
        name, place = strings[0]
        if isinstance(name, str) and not is_field_name(name):
            raise ScriptError(f"{name!r} is no name of a header field", place)
        return name

    def matcher(self, keys: int, captures: bool = True, split: Callable[[Iterable[str]], list[str]] = list) -> Matcher:
        """What compares values with the keys of an argument, as the tags say; see Matcher. Raises ScriptError."""
        comparator = self._comparator()
        match = self.first_of(":is", ":contains", ":matches", ":regex", ":value", ":count") or "is"
        if match in ("contains", "matches", "regex") and not comparator.has_substrings:
            text = f":{match} does not work with the comparator {comparator.name}: use :is, :value or :count"
            raise ScriptError(text, self.place_of(f":{match}"))
        relation = self.constant(f":{match}").lower() if match in ("value", "count") else "eq"
        if relation not in RELATIONS:
            text = f"{relation!r} is no relation: write one of {', '.join(RELATIONS)}"
            raise ScriptError(text, self.place_of(f":{match}"))
        strings = self.strings(keys)
        captures = captures and "variables" in self.compiler.enabled
        if match == "regex":
            self.compiler.regexes += len(strings)
            if self.compiler.regexes > REGEXES_LIMIT:
                raise ScriptError(f"there are more than {REGEXES_LIMIT} regular expressions", self.place_of(":regex"))
        try:
            return Matcher(match, comparator, [text for text, _ in strings], relation, captures, split)
        except ValueError as error:
            raise ScriptError(str(error), place_of_wrong_regex(strings)) from None

    def _comparator(self) -> Comparator:
        """The comparator that the tag names. Raises ScriptError."""
        if not self.has(":comparator"):
            return COMPARATORS[DEFAULT_COMPARATOR]
        name, place = self.constant(":comparator"), self.place_of(":comparator")
        if name not in COMPARATORS:
            raise ScriptError(f"there is no comparator {name!r}: write one of {', '.join(COMPARATORS)}", place)
        if name not in BASE_COMPARATORS:
            self.compiler.demand(f"comparator-{name}", f"the comparator {name}", place)
        return COMPARATORS[name]

    def _take_tag(self, argument: Argument, rest: Iterator[Argument]) -> None:
        """Takes a tag and the value that follows it. Raises ScriptError."""
        name = argument.value
        self._tag_places.setdefault(name, argument.start)
        tag = self.word.tags.get(name)
        if not tag:
            hint = similar_word(name, self.word.tags)
            raise ScriptError(f"{self.word.name} has no tag {name}{hint}", argument.start)
        if self._positional:
            raise ScriptError(f"{name} must stand before the arguments that have no tag: move it", argument.start)
        if tag.capability:
            self.compiler.demand(tag.capability, f"the tag {name}", argument.start)
        for other in self._tags:
            if self.word.tags[other].group == tag.group:
                text = f"{name} is given twice" if other == name else f"{name} cannot stand beside {other}"
                raise ScriptError(f"{text}: remove one of the two", argument.start)
        if tag.value:
            value = next(rest, None)
            if not value or not fits(value.kind, tag.value):
                found = f", not {value.value}" if value and value.kind == TAG else ""
                raise ScriptError(f"a {tag.value} must follow {name}{found}", value.start if value else self.node.after)
            argument = value
        self._tags[name] = argument

    def tag_place(self, tag: str) -> int:
        """Where a tag that is given stands."""
        return self._tag_places[tag]

    def _check_positional(self) -> None:
        """Puts None in place of missing optional arguments. Raises ScriptError."""
        word, given = self.word, len(self._positional)
        kinds = word.arguments
        if given > len(kinds) and (extra := self._positional[len(kinds)]):
            tags = f": its tags are {', '.join(word.tags)}" if word.tags and not kinds else ""
            raise ScriptError(f"{word.name} has no {extra.kind} without a tag here{tags}", extra.start)
        if given < len(kinds) - word.optional:
            missing = kinds[word.optional + given]
            raise ScriptError(f"{word.name} needs a {missing} here", self.node.after)
        self._positional[:0] = [None] * (len(kinds) - given)
        for argument, kind in zip(self._positional, kinds):
            if argument and not fits(argument.kind, kind):
                raise ScriptError(f"{word.name} needs a {kind} here, not a {argument.kind}", argument.start)


def place_of_wrong_regex(strings: Sequence[tuple[Text, int]]) -> int:
    """The place of the first string that is no regular expression. strings: as Call.strings() gives them."""
    for text, place in strings:
        try:
            if isinstance(text, str):
                regex_of(text, ignores_case=False)
        except ValueError:
            return place
    return strings[0][1]


def fits(kind: str, wanted: str) -> bool:
    """Whether an argument of that kind may be where another is wanted: a string is a list of one."""
    return kind == wanted or (wanted == STRINGS and kind == STRING)


def all_of(texts: Sequence[Text], change: Callable[[str], str] = as_it_is) -> Callable[[Run], list[str]]:
    """A function that gives the values of string arguments, each changed."""
    if all(isinstance(text, str) for text in texts):
        fixed = [change(str(text)) for text in texts]
        return lambda _run: fixed
    return lambda run: [change(expanded(text, run)) for text in texts]


def similar_word(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is most similar to a misspelt one; "" if none is."""
    import difflib

    found = difflib.get_close_matches(word, list(known), 1, SIMILAR)
    return f": did you mean {found[0]}?" if found else ""


def known_true(_run: Run) -> bool:
    """A test that the checker knows to be true: ihave with capabilities that are there."""
    return True


def known_false(_run: Run) -> bool:
    """A test that the checker knows to be false: what depends on it is not checked (RFC 5463 section 4)."""
    return False


class Compiler:
    """Checks one script, and makes functions of it that run it.

    enabled: the capabilities that the script has required. shared, own: the names of its global and of its other
    variables. loops: the names of the loops around the present command. regexes: how many there are so far. traced:
    whether each test reports its result.
    """

    def __init__(self, language: Language, size_limit: int, traced: bool = False) -> None:
        self.language, self._size_limit, self._traced = language, size_limit, traced
        self.enabled: set[str] = set()
        self.shared: set[str] = set()
        self.own: set[str] = set()
        self.loops: list[str] = []
        self.regexes = 0
        self.may_require = True
        self._text = ""
        self._errors: list[ScriptError] = []

    def compile(self, octets: bytes, name: str) -> Script:
        """The script. name: its path, for errors. Raises ScriptErrors."""
        try:
            if len(octets) > self._size_limit:
                raise ScriptError(f"the script has more than {self._size_limit} bytes", 0)
            self._text = decoded_script(octets)
            nodes = Parser(self._text).parse()
        except ScriptError as error:
            text = self._text or octets.decode("utf-8", "replace").replace("\r\n", "\n")
            raise ScriptErrors([error], text, name) from None
        block = self.block(nodes)
        if self._errors:
            raise ScriptErrors(self._errors, self._text, name)
        return Script(name, self._text, block)

    def block(self, nodes: Sequence[Node]) -> Step:
        """What runs these commands one after the other. Errors in them are kept for compile()."""
        steps: list[tuple[int, Step]] = []
        chain: list[tuple[Check, Step]] | None = None  # of the present if, elsif, else
        for node in nodes:
            if len(self._errors) >= ERRORS_LIMIT:
                break
            try:
                if node.name in ("elsif", "else"):
                    if chain is None:
                        raise ScriptError(f"{node.name} must follow the block of an if or elsif", node.start)
                    chain.append(self._branch(node, chain))
                    if node.name == "else":
                        chain = None
                    continue
                chain = None
                if node.name == "if":
                    chain = []
                    steps.append((node.start, choice(chain)))
                    chain.append(self._branch(node, chain))
                else:
                    steps.append((node.start, self.command(node)))
            except ScriptError as error:
                self._errors.append(error)
            if node.name != "require":
                self.may_require = False
        return sequence(steps)

    def command(self, node: Node) -> Step:
        """What runs a command. Raises ScriptError."""
        word = self.language.commands.get(node.name)
        if not word:
            if node.name in self.language.tests:
                text = f"{node.name} is a test, which stands after if, elsif, not, allof or anyof"
                raise ScriptError(text, node.start)
            hint = similar_word(node.name, [*self.language.commands, "if", "elsif", "else"])
            raise ScriptError(f"there is no command {node.name}{hint}", node.start)
        result: Step = self._compiled(node, word)
        return result

    def test(self, node: Node) -> Check:
        """What runs a test. Raises ScriptError."""
        word = self.language.tests.get(node.name)
        if not word:
            if node.name in self.language.commands:
                raise ScriptError(f"{node.name} is a command, not a test", node.start)
            raise ScriptError(f"there is no test {node.name}{similar_word(node.name, self.language.tests)}", node.start)
        if node.block is not None:
            raise ScriptError(f"{node.name} is a test, which has no block", node.start)
        check: Check = self._compiled(node, word)
        return self._reporting(check, node) if self._traced and check not in (known_true, known_false) else check

    def enable(self, capability: str) -> None:
        """Lets the script use a capability, and what is a part of it."""
        self.enabled.add(capability)
        if capability in IMPLIED:
            self.enabled.add(IMPLIED[capability])

    def demand(self, capability: str, what: str, place: int) -> None:
        """Raises ScriptError unless the script has required the capability."""
        if capability not in self.enabled:
            raise ScriptError(f'{what} needs a line at the beginning: require "{capability}";', place)

    def text(self, value: str, place: int) -> Text:
        """A string, with what it may contain under the required capabilities. Raises ScriptError."""
        if "\n" in value:
            value = value.replace("\n", "\r\n")  # as in a message: RFC 5228 section 2.4.2
        if "${" not in value:
            return value
        if "encoded-character" in self.enabled:
            value = with_decoded_characters(value, place)
        if "variables" in self.enabled:
            return template_of(value, place, self)
        return value

    def variable(self, name: str, place: int) -> tuple[str, bool]:
        """The variable with that name, and whether it is a global one. Raises ScriptError for a name that is none."""
        namespace, dot, rest = name.lower().rpartition(".")
        if not is_identifier(rest) or (dot and not is_identifier(namespace)):
            text = f"{name!r} cannot be a variable's name: it has letters, digits and _, and begins with no digit"
            raise ScriptError(text, place)
        if len(rest) > NAME_LENGTH_LIMIT:
            raise ScriptError(f"the variable's name has more than {NAME_LENGTH_LIMIT} characters", place)
        if not dot:
            if rest not in self.shared:
                self.own.add(rest)
            return rest, rest in self.shared
        if namespace != "global":
            raise ScriptError(f"there are no variables that begin with {namespace}.", place)
        self.demand("include", f"the variable {name}", place)
        return rest, True

    def _compiled(self, node: Node, word: Word) -> Any:
        if word.capability:
            self.demand(word.capability, node.name, node.start)
        call = Call(node, word, self)
        is_command = node.name in self.language.commands
        if word.tests == MANY and not node.listed:
            place = node.tests[0].start if node.tests else node.after
            raise ScriptError(f"{node.name} needs tests in parentheses: {node.name} (..., ...)", place)
        if word.tests == 1:
            self.check_one_test(node)
        if not word.tests and node.tests:
            missing = "a block in braces { }"
            if not is_command:
                missing = f"a comma (,), or {missing},"
            elif not word.has_block:
                missing = "a semicolon (;)"
            raise ScriptError(f"{node.name} has no test after it: {missing} is missing here", node.tests[0].start)
        if is_command and word.has_block != (node.block is not None):
            wanted = "a block in braces { }" if word.has_block else "a semicolon (;), and no block"
            raise ScriptError(f"{node.name} needs {wanted} here", node.after)
        return word.compiled(call)

    def check_one_test(self, node: Node) -> None:
        """Raises ScriptError unless the node has one test, without parentheses."""
        if not node.tests:
            raise ScriptError(f"{node.name} needs a test here", node.after)
        if node.listed:
            raise ScriptError(f"{node.name} needs one test, without parentheses", node.tests[0].start)

    def _branch(self, node: Node, before: Sequence[tuple[Check, Step]]) -> tuple[Check, Step]:
        """The test and the block of an if, elsif or else. before: those before it."""
        check: Check = known_true
        if any(earlier is known_true for earlier, _ in before):
            return known_false, sequence([])  # it is not checked, either
        try:
            check = self._condition(node)
        except ScriptError as error:
            self._errors.append(error)
        self.may_require = False
        if check is known_false:
            return known_false, sequence([])
        return check, self.block(node.block or [])

    def _condition(self, node: Node) -> Check:
        """The test of an if or elsif; for else, one that is always true. Raises ScriptError."""
        if node.arguments:
            raise ScriptError(f"{node.name} needs a test here", node.arguments[0].start)
        if node.name == "else":
            if node.tests:
                raise ScriptError("else has no test: write elsif in place of else if", node.tests[0].start)
        else:
            self.check_one_test(node)
        check = self.test(node.tests[0]) if node.tests else lambda _: True
        if node.block is None:
            raise ScriptError(f"{node.name} needs a block in braces {{ }} here", node.after)
        return check

    def _reporting(self, check: Check, node: Node) -> Check:
        """The same test, which reports its result."""
        source = " ".join(self._text[node.start : node.end].split())

        def reporting(run: Run) -> bool:
            result = check(run)
            if run.report and run.script:
                run.report(run.script, run.script.line_of(node.start), f"{source}: {'yes' if result else 'no'}")
            return result

        return reporting


def template_of(value: str, place: int, compiler: Compiler) -> Text:
    """A string with its variables. Raises ScriptError."""
    literal, *rest = value.split("${")
    parts: list[str | Callable[[Run], str]] = [literal]
    for piece in rest:
        name, brace, after = piece.partition("}")
        reference = reference_to(name, place, compiler) if brace else None
        parts += [reference, after] if reference else [f"${{{piece}"]
    if all(isinstance(part, str) for part in parts):
        return value
    return Template([part for part in parts if part], value)


def reference_to(name: str, place: int, compiler: Compiler) -> Callable[[Run], str] | None:
    """What gives the value of ${name}; None if that is no variable. Raises ScriptError."""
    if name and DECIMAL.issuperset(name):
        index = int(name[-NAME_LENGTH_LIMIT:])
        if index >= WILDCARD_LIMIT:
            text = f"there is no match variable ${{{name}}}: the last one is ${{{WILDCARD_LIMIT - 1}}}"
            raise ScriptError(text, place)
        return lambda run: run.matched[index][:VARIABLE_LIMIT] if index < len(run.matched) else ""
    if not all(is_identifier(part) for part in name.split(".")):
        return None
    key, is_shared = compiler.variable(name, place)
    if is_shared:
        return lambda run: run.shared_variables.get(key, "")
    return lambda run: run.variables.get(key, "")


def sequence(steps: Sequence[tuple[int, Step]]) -> Step:
    """What runs commands one after the other, each given with its place."""
    work = COMMAND_STEPS * len(steps)

    def run_steps(run: Run) -> None:
        run.spend(work)
        for run.place, step in steps:
            step(run)

    return run_steps


def choice(branches: Sequence[tuple[Check, Step]]) -> Step:
    """What runs the block of the first test that is true."""

    def run_first(run: Run) -> None:
        for check, block in branches:
            if check(run):
                block(run)
                return

    return run_first


def is_identifier(name: str) -> bool:
    """Whether it may be the name of a variable (RFC 5229 section 3)."""
    return bool(name) and name[0] in IDENTIFIER_START and IDENTIFIER.issuperset(name)


def with_decoded_characters(text: str, place: int) -> str:
    """The text with what ${hex: ...} and ${unicode: ...} stand for. Raises ScriptError.

    Source: RFC 5228 section 2.4.2.4.
    """
    literal, *rest = text.split("${")
    pieces = [literal]
    for piece in rest:
        code, brace, after = piece.partition("}")
        decoded = decoded_characters(code, place) if brace else None
        pieces += ["${", piece] if decoded is None else [decoded, after]
    try:  # octets one after the other may be one character
        return "".join(pieces).encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        raise ScriptError("the bytes that ${hex: ...} stands for are not UTF-8", place) from None


def decoded_characters(code: str, place: int) -> str | None:
    """The characters of "hex: 40 41" or "unicode: 40"; None if it is neither. Raises ScriptError."""
    kind, colon, numbers = code.partition(":")
    kind, digits = kind.lower(), numbers.split()
    if not colon or not digits or not all(CODE_DIGITS.issuperset(each) for each in digits):
        return None
    if kind == "hex" and all(len(each) <= 2 for each in digits):
        return bytes(int(each, 16) for each in digits).decode("utf-8", "surrogateescape")
    if kind != "unicode":
        return None
    points = [int(each, 16) if len(each.lstrip("0")) < 7 else sys.maxsize for each in digits]
    if any(point > sys.maxunicode or 0xD800 <= point < 0xE000 for point in points):
        raise ScriptError(f"${{{code}}} has a number that no character has", place)
    return "".join(map(chr, points))


# ======================================================================
# Sieve: tests
#
# Owns the tests of scripts: for each the function that makes of its arguments
# what runs it.
# Must not know files, and how mail is stored.
# ======================================================================

# Fields that have addresses (RFC 5228 section 5.1).
ADDRESS_FIELDS = frozenset(
    [
        "from",
        "to",
        "cc",
        "bcc",
        "sender",
        "reply-to",
        "return-path",
        "delivered-to",
        "envelope-to",
        "x-original-to",
        "errors-to",
        "mail-followup-to",
        "mail-reply-to",
        "disposition-notification-to",
        "return-receipt-to",
        "apparently-to",
        "for-approval",
        "for-comment",
        "for-handling",
        "resent-from",
        "resent-to",
        "resent-cc",
        "resent-bcc",
        "resent-sender",
        "resent-reply-to",
        "abuse-reports-to",
        "x-envelope-to",
    ]
)
ADDRESS_PARTS = (":all", ":localpart", ":domain", ":user", ":detail")
DATE_PARTS = (
    *("year", "month", "day", "date", "julian", "hour", "minute", "second", "time", "iso8601", "std11", "zone"),
    "weekday",
)
MODIFIED_JULIAN_DAY = 40587  # of 1 January 1970
DATE_LIMIT = 256  # characters of a date that are looked at
DATE_PLACES = 3  # semicolons after which a date is looked for
DATE_STEPS = 50  # what it costs to read or write a date
WEEK = 7 * DAY  # how long the test duplicate remembers, by default


def always_true(_call: Call) -> Check:
    """The test true (RFC 5228 section 5.10)."""
    return lambda _run: True


def always_false(_call: Call) -> Check:
    """The test false (RFC 5228 section 5.6)."""
    return lambda _run: False


def negation(call: Call) -> Check:
    """The test not (RFC 5228 section 5.8)."""
    check = call.compiler.test(call.node.tests[0])
    if check in (known_true, known_false):
        return known_false if check is known_true else known_true
    return lambda run: not check(run)


def conjunction(call: Call) -> Check:
    """The test allof (RFC 5228 section 5.2)."""
    return combination(call, known_false, known_true, lambda checks: lambda run: all(check(run) for check in checks))


def disjunction(call: Call) -> Check:
    """The test anyof (RFC 5228 section 5.3)."""
    return combination(call, known_true, known_false, lambda checks: lambda run: any(check(run) for check in checks))


def combination(call: Call, decisive: Check, neutral: Check, combined: Callable[[list[Check]], Check]) -> Check:
    """Several tests as one. decisive: after it no other test is checked. neutral: it does not count."""
    checks: list[Check] = []
    for node in call.node.tests:
        check = call.compiler.test(node)
        if check is decisive:
            return decisive
        if check is not neutral:
            checks.append(check)
    return combined(checks) if checks else neutral


def has_capability(call: Call) -> Check:
    """The test ihave (RFC 5463 section 4): known to the checker, which then does as if they were required."""
    wanted = [name for name, _ in call.constants(0)]
    if not call.compiler.language.capabilities.issuperset(wanted):
        return known_false
    for capability in wanted:
        call.compiler.enable(capability)
    return known_true


def size_is(call: Call) -> Check:
    """The test size (RFC 5228 section 5.9)."""
    over, under = call.number(":over"), call.number(":under")
    if over is not None:
        limit = over
        return lambda run: size_on_the_wire(run) > limit
    if under is None:
        raise ScriptError("size needs :over or :under, and a number", call.node.start)
    maximum = under
    return lambda run: size_on_the_wire(run) < maximum


def size_on_the_wire(run: Run) -> int:
    """The octets of the message with CR LF at the end of lines."""
    return run.subject.message.size + run.subject.message.lines


def fields_exist(call: Call) -> Check:
    """The test exists (RFC 5228 section 5.5, RFC 5703 section 4.3)."""
    check_mime_tags(call)
    names = all_of(call.texts(0), str.lower)
    if not call.has(":mime"):
        return lambda run: all(run.subject.has_field(name) for name in names(run))
    parts = parts_at_hand(call)

    def exist(run: Run) -> bool:
        headers = [run.subject.header_of(part) for part in parts(run)]
        return all(any(run.subject.has_field(name, header) for header in headers) for name in names(run))

    return exist


def fields_match(call: Call) -> Check:
    """The test header (RFC 5228 section 5.7, RFC 5260 section 6, RFC 5703 section 4.1)."""
    check_mime_tags(call)
    names, matcher = all_of(call.texts(0), str.lower), call.matcher(1)
    pick = pick_of(call)
    if call.has(":mime"):
        bodies, read = bodies_at_hand(call, names, pick), content_reader(call)
        return lambda run: matcher.accepts(run, [value for field in bodies(run) for value in read(*field, run)])

    def match(run: Run) -> bool:
        fields = (run.subject.values(name) for name in names(run))
        return matcher.accepts(run, (value for each in fields for value in (pick(each) if pick else each)))

    if (fixed := call.fixed(0)) and len(fixed) == 1 and not pick:  # the usual case, in half the time
        only = fixed[0].lower()
        return lambda run: matcher.accepts(run, run.subject.values(only))
    return match


def pick_of(call: Call) -> Callable[[list[Any]], list[Any]] | None:
    """What picks the field that :index and :last name; None if they are not given. Raises ScriptError."""
    index = call.number(":index")
    if index is None:
        if call.has(":last"):
            raise ScriptError(":last needs :index and a number before it", call.place_of(":last"))
        return None
    if not index:
        raise ScriptError("the first field has the index 1", call.place_of(":index"))
    if call.has(":last"):
        return lambda fields: fields[-index : len(fields) - index + 1] if index <= len(fields) else []
    return lambda fields: fields[index - 1 : index]


def check_mime_tags(call: Call) -> None:
    """Raises ScriptError for a tag that makes sense with :mime only (RFC 5703 section 4)."""
    for tag in (":anychild", ":type", ":subtype", ":contenttype", ":param"):
        if call.has(tag) and not call.has(":mime"):
            raise ScriptError(f"{tag} needs :mime before it", call.place_of(tag))


def parts_at_hand(call: Call) -> Callable[[Run], Iterable[Part]]:
    """The part of a test with :mime; with :anychild its descendants, too (RFC 5703 section 4)."""
    if call.has(":anychild"):
        return lambda run: run.subject.here().walk()
    return lambda run: [run.subject.here()]


def bodies_at_hand(
    call: Call, names: Callable[[Run], list[str]], pick: Callable[[list[Any]], list[Any]] | None
) -> Callable[[Run], Iterator[tuple[str, bytes]]]:
    """The fields of the parts that a test with :mime looks at, each as name and body."""
    parts = parts_at_hand(call)

    def bodies(run: Run) -> Iterator[tuple[str, bytes]]:
        for part in parts(run):
            run.spend(PART_STEPS)
            header = run.subject.header_of(part)
            for name in names(run):
                fields = run.subject.bodies(name, header)
                for body in pick(fields) if pick else fields:
                    run.spend(FIELD_STEPS + len(body))
                    yield name, body

    return bodies


def content_reader(call: Call) -> Callable[[str, bytes, Run], list[str]]:
    """What a test with :mime takes from a field: its value, or what :type and the like say (RFC 5703 section 4.1).

    What a field does not have is empty.
    """
    option, counts = call.first_of(":type", ":subtype", ":contenttype", ":param"), call.has(":count")
    wanted = all_of(call.texts(":param"), str.lower)

    def read(name: str, body: bytes, run: Run) -> list[str]:
        if not option:
            return [unstructured(body)]
        if name == "content-type":
            content_type = ContentType.parse(body)
        elif name == "content-disposition":
            content_type = ContentType.parse_disposition(body)
        else:
            return [""]
        if option == "param":
            parameters = content_type.parameters
            values = [parameters[each] for each in wanted(run) if each in parameters]
            return values if values or counts else [""]
        if option == "contenttype":
            return [str(content_type)]
        return [content_type.type if option == "type" else content_type.subtype]

    return read


def addresses_match(call: Call) -> Check:
    """The test address (RFC 5228 section 5.1, RFC 5233, RFC 5260 section 6, RFC 5703 section 4.2)."""
    for name, place in call.strings(0) if not call.has(":mime") else ():
        if isinstance(name, str) and is_field_name(name) and name.lower() not in ADDRESS_FIELDS:
            raise ScriptError(f"{name!r} is no field that has addresses: use the test header for it", place)
    check_mime_tags(call)
    names, matcher, part = all_of(call.texts(0), str.lower), call.matcher(1), part_of_address(call)
    pick = pick_of(call)
    bodies = bodies_at_hand(call, names, pick) if call.has(":mime") else None

    def read(run: Run, found: Iterable[bytes]) -> list[str]:
        """The part of each address in the bodies of fields."""
        found = list(found)
        run.spend(4 * sum(map(len, found)))
        addresses = [address for body in found for address in addresses_in(body)]
        return [value for address in addresses if (value := part(address, run)) is not None]

    def read_all(run: Run, wanted: Sequence[str]) -> list[str]:
        """The same for the fields with these names."""
        fields = [run.subject.bodies(name) for name in dict.fromkeys(wanted) if name in ADDRESS_FIELDS]
        return read(run, [body for each in fields for body in (pick(each) if pick else each)])

    def match(run: Run) -> bool:
        if bodies:
            return matcher.accepts(run, read(run, [body for _, body in bodies(run)]))
        wanted = names(run)
        return matcher.accepts(run, run.subject.remembered((*kind, *wanted), lambda: read_all(run, wanted)))

    kind = call.first_of(*ADDRESS_PARTS), str(call.number(":index")), str(call.has(":last"))
    return match


def part_of_address(call: Call) -> Callable[[Address, Run], str | None]:
    """What gives the part of an address that a test looks at; None if the address has no such part."""
    return {
        "": lambda address, _: whole_address(address),
        "all": lambda address, _: whole_address(address),
        "localpart": lambda address, _: address.local,
        "domain": lambda address, _: address.domain if address.domain or not address.local else None,
        "user": lambda address, run: user_and_detail(address, run)[0],
        "detail": lambda address, run: user_and_detail(address, run)[1],
    }[call.first_of(*ADDRESS_PARTS)]


def whole_address(address: Address) -> str:
    """An address as tests compare it; without a domain it may be anything."""
    return str(address) if address.domain else address.local


def user_and_detail(address: Address, run: Run) -> tuple[str, str | None]:
    """The user and the detail of an address; None for the detail if there is no delimiter (RFC 5233 section 4).

    The null reverse-path is an empty string in all its parts (RFC 5228 section 5.4).
    """
    if not address.local and not address.domain:
        return "", ""
    end = first_of(run.around.config.recipient_delimiter, address.local)
    return address.local[:end], address.local[end + 1 :] if end < len(address.local) else None


def envelope_matches(call: Call) -> Check:
    """The test envelope (RFC 5228 section 5.4)."""
    for name, place in call.strings(0):
        if isinstance(name, str) and name.lower() not in ("from", "to"):
            raise ScriptError(f"{name!r} is no part of the envelope: write from or to", place)
    names, matcher, part = all_of(call.texts(0), str.lower), call.matcher(1), part_of_address(call)

    def match(run: Run) -> bool:
        found = {"from": run.around.reverse_path, "to": run.around.recipient.address}
        if matcher.match == "count":  # of the null reverse-path it is 0: RFC 5231 section 4.2
            found = {name: address for name, address in found.items() if address}
        values = [part(found[name] or Address("", ""), run) for name in names(run) if name in found]
        return matcher.accepts(run, [value for value in values if value is not None])

    return match


def strings_match(call: Call) -> Check:
    """The test string (RFC 5229 section 5)."""
    sources, matcher = all_of(call.texts(0)), call.matcher(1)
    if matcher.match == "count":
        return lambda run: matcher.accepts(run, filter(None, sources(run)))
    return lambda run: matcher.accepts(run, sources(run))


def environment_matches(call: Call) -> Check:
    """The test environment (RFC 5183 section 4)."""
    name, matcher = call.text(0) or "", call.matcher(1)

    def match(run: Run) -> bool:
        value = run.around.environment(expanded(name, run).lower())
        return value is not None and matcher.accepts(run, [value])

    return match


def flags_match(call: Call) -> Check:
    """The test hasflag (RFC 5232 section 4)."""
    flags = flag_lists(call)
    matcher = call.matcher(1) if call.has(":count") else call.matcher(1, split=words_of)
    return lambda run: matcher.accepts(run, normalized_flags(run.billed(flags(run))))


def flag_lists(call: Call) -> Callable[[Run], list[str]]:
    """The flags in the variables that the first argument names; without it those of the internal variable."""
    variables = flag_variables(call)
    if not variables:
        return lambda run: run.flags

    def lists(run: Run) -> list[str]:
        return [(run.shared_variables if shared else run.variables).get(name, "") for name, shared in variables]

    return lists


def flag_variables(call: Call) -> list[tuple[str, bool]]:
    """The variables that the first argument of a command for flags names. Raises ScriptError."""
    names = call.constants(0)
    if names:
        call.compiler.demand("variables", "a variable's name", call.place_of(0))
    return [call.compiler.variable(name, place) for name, place in names]


def body_matches(call: Call) -> Check:
    """The test body (RFC 5173). It sets no match variables: section 6."""
    matcher = call.matcher(0, captures=False)
    if call.has(":raw"):
        return lambda run: matcher.accepts(run, counted(run, raw_body(run)))
    if call.has(":content"):
        types = all_of(call.texts(":content"), str.lower)
        return lambda run: matcher.accepts(run, counted(run, contents(run, types(run))))
    return lambda run: matcher.accepts(run, counted(run, run.subject.texts()))


def raw_body(run: Run) -> list[str]:
    """The body as it is, TEXT_LIMIT octets at most; nothing if there is none."""
    message = run.subject.message
    octets = message.read(message.body_offset, TEXT_LIMIT)
    return [octets_as_text(octets)] if octets else []


def octets_as_text(octets: bytes) -> str:
    """Octets as text: UTF-8 where they are that."""
    return octets.decode("utf-8", "surrogateescape")


def counted(run: Run, texts: Iterable[str]) -> Iterator[str]:
    """The texts, with their length counted as work."""
    for text in texts:
        run.spend(1 + len(text) // 16)
        yield text.replace("\r\n", "\n").replace("\n", "\r\n")  # as strings in scripts have it


def contents(run: Run, types: Sequence[str]) -> Iterator[str]:
    """The decoded contents of the parts of these types (RFC 5173 section 5.2)."""
    room = TEXTS_LIMIT
    for part in run.subject.root.walk():
        run.spend(PART_STEPS)
        kind = part.content_type
        if not any(wanted in ("", kind.type, str(kind)) for wanted in types):
            continue
        for octets in octets_of_part(part, min(TEXT_LIMIT, room)):
            room -= len(octets)
            run.spend(1 + len(octets) // 16)
            is_text = kind.type == "text"
            yield (
                charset_text(octets, kind.parameters.get("charset", "us-ascii")) if is_text else octets_as_text(octets)
            )


def octets_of_part(part: Part, limit: int) -> Iterator[bytes]:
    """What a test of a part's content looks at, so many octets of each at most (RFC 5173 section 5.2)."""
    if part.content_type.type == "multipart":
        yield part.prologue(limit)
        yield part.epilogue(limit)
    elif str(part.content_type) == "message/rfc822":
        for inner in part.children():
            yield inner.header.octets
    else:
        yield part.content(limit)


def date_matches(call: Call) -> Check:
    """The test date (RFC 5260 section 4)."""
    names, matcher = all_of(call.texts(0), str.lower), call.matcher(2)
    part, zone, pick = date_part_of(call, 1), zone_of(call), pick_of(call)

    def match(run: Run) -> bool:
        values = []
        for name in names(run):
            found = run.subject.values(name)
            for value in pick(found) if pick else found[:1]:
                run.spend(DATE_STEPS)
                if date := date_in(value):
                    seconds, own_zone = date
                    values.append(date_text(part(run), seconds, zone(run, seconds, own_zone)))
        return matcher.accepts(run, filter(None, values))

    return match


def date_in(value: str) -> tuple[int, int] | None:
    """The date in the value of a field, perhaps after a semicolon as in Received; see date_of()."""
    for place in range(1, DATE_PLACES + 1):  # a comment may have a semicolon, too
        rest = value.rsplit(";", place)
        if date := date_of(";".join(rest[1 if len(rest) > place else 0 :])[:DATE_LIMIT]):
            return date
    return None


def current_date_matches(call: Call) -> Check:
    """The test currentdate (RFC 5260 section 5)."""
    part, zone, matcher = date_part_of(call, 0), zone_of(call), call.matcher(1)

    def match(run: Run) -> bool:
        now = int(run.started)
        run.spend(DATE_STEPS)
        return matcher.accepts(run, filter(None, [date_text(part(run), now, zone(run, now, 0))]))

    return match


def date_part_of(call: Call, argument: int) -> Callable[[Run], str]:
    """The name of a part of a date, in lower case. Raises ScriptError."""
    name = call.text(argument) or ""
    if isinstance(name, str) and name.lower() not in DATE_PARTS:
        text = f"{name!r} is no part of a date: write one of {', '.join(DATE_PARTS)}"
        raise ScriptError(text, call.place_of(argument))
    return lambda run: expanded(name, run).lower()


def zone_of(call: Call) -> Callable[[Run, int, int], int]:
    """What gives the time zone of a test in minutes, given the date in seconds and its own zone. Raises ScriptError."""
    if call.has(":originalzone"):
        return lambda _run, _seconds, own: own
    wanted = call.text(":zone")
    if wanted is None:
        return lambda _run, seconds, _own: time.localtime(seconds).tm_gmtoff // 60
    if isinstance(wanted, str) and zone_minutes(wanted) is None:
        raise ScriptError(f"{wanted!r} is no time zone: write one such as +0200", call.place_of(":zone"))
    text: Text = wanted

    def zone(run: Run, _seconds: int, _own: int) -> int:
        value = expanded(text, run)
        if (minutes := zone_minutes(value)) is None:
            raise RunError(f"{value!r} is no time zone: it must be one such as +0200")
        return minutes

    return zone


def zone_minutes(zone: str) -> int | None:
    """The minutes of a zone such as +0230; None if it is none."""
    sign, digits = zone[:1], zone[1:]
    if sign not in ("+", "-") or len(digits) != 4 or not DECIMAL.issuperset(digits) or int(digits[2:]) > 59:
        return None
    minutes = int(digits[:2]) * 60 + int(digits[2:])
    return -minutes if sign == "-" else minutes


def date_text(part: str, seconds: int, zone: int) -> str:
    """A part of a date as RFC 5260 section 4.2 writes it; "" for one that does not exist."""
    local = seconds + zone * 60
    when = time.gmtime(local)
    hours, minutes = divmod(abs(zone), 60)
    sign = "-" if zone < 0 else "+"
    date, clock = f"{when.tm_year:04}-{when.tm_mon:02}-{when.tm_mday:02}", time.strftime("%H:%M:%S", when)
    return {
        "year": f"{when.tm_year:04}",
        "month": f"{when.tm_mon:02}",
        "day": f"{when.tm_mday:02}",
        "date": date,
        "julian": str(local // DAY + MODIFIED_JULIAN_DAY),
        "hour": f"{when.tm_hour:02}",
        "minute": f"{when.tm_min:02}",
        "second": f"{when.tm_sec:02}",
        "time": clock,
        "iso8601": f"{date}T{clock}" + (f"{sign}{hours:02}:{minutes:02}" if zone else "Z"),
        "std11": f"{time.strftime('%a, %d %b', when)} {when.tm_year:04} {clock} {sign}{hours:02}{minutes:02}",
        "zone": f"{sign}{hours:02}{minutes:02}",
        "weekday": str((when.tm_wday + 1) % 7),
    }.get(part, "")


def folders_exist(call: Call) -> Check:
    """The test mailboxexists (RFC 5490 section 3.1)."""
    names = all_of(call.texts(0))
    return lambda run: all(run.look_up().has_folder(name) for name in names(run))


def special_uses_exist(call: Call) -> Check:
    """The test specialuse_exists (RFC 8579 section 4)."""
    folder, uses = call.text(0), all_of(call.texts(1), str.lower)

    def exist(run: Run) -> bool:
        folders = [run.look_up().special_folder(use) for use in uses(run)]
        if folder is None:
            return all(name is not None and run.look_up().has_folder(name) for name in folders)
        name = expanded(folder, run)
        return run.look_up().has_folder(name) and all(each is not None and each == name for each in folders)

    return exist


def is_duplicate(call: Call) -> Check:
    """The test duplicate (RFC 7352 section 3). What it has seen is recorded once the message is stored."""
    field, unique = call.text(":header"), call.text(":uniqueid")
    handle, seconds, is_last = call.text(":handle") or "", call.number(":seconds"), call.has(":last")

    def check(run: Run) -> bool:
        if unique is not None:
            value = expanded(unique, run)
        else:
            name = "message-id" if field is None else expanded(field, run).lower()
            value = next(iter(run.subject.values(name)), "")
        if not value:
            return False
        record = shortened("\0".join(("duplicate", expanded(handle, run), value)))
        has_seen = run.look_up().has_seen(record)
        if is_last or not has_seen:
            longest = run.around.config.sieve_duplicate_max_expiration
            run.remember(record, min(WEEK if seconds is None else seconds, longest))
        return has_seen

    return check


def spam_matches(call: Call) -> Check:
    """The test spamtest (RFC 5235 section 2)."""
    return score_matches(call, "spam", 100 if call.has(":percent") else 10)


def virus_matches(call: Call) -> Check:
    """The test virustest (RFC 5235 section 3)."""
    return score_matches(call, "virus", 5)


def score_matches(call: Call, of: str, best: int) -> Check:
    """A test of a score: 0 without a check for which :count is 0 (RFC 5235 section 2.2)."""
    matcher = call.matcher(0)

    def match(run: Run) -> bool:
        score = run.around.score(run.subject, of, best)
        return matcher.accepts(run, ["0" if score is None else score] if score or matcher.match != "count" else [])

    return match


# ======================================================================
# Sieve: sending
#
# Owns the commands of scripts that send mail, and the tests of notifications.
# Must not know how mail is sent.
# ======================================================================

REPLY_LINES = 50  # lines of a reply that a user has written
REPLY_LINE = 200  # characters of such a line
ADDRESS_STEPS = 100  # what it costs to take an address apart, and to compare it with those of the user
DOMAIN_STEPS = 20  # what each character of a domain beyond ASCII costs
ANSWER_OCTETS = 16  # octets of a header that are examined for an answer in one step
DEFAULT_DAYS = 7  # until a sender gets an answer again, RFC 5230 section 4.1


def flags_of(call: Call) -> Callable[[Run], Sequence[str]]:
    """The flags of an action: those of :flags, else the internal variable (RFC 5232 section 5)."""
    if not call.has(":flags"):
        return lambda run: run.flags
    lists = all_of(call.texts(":flags"))
    return lambda run: normalized_flags(run.billed(lists(run)))


def directory_of(call: Call) -> Callable[[Run, str], str]:
    """What gives the directory of the folder with a name, or of that with the special use in the tag :specialuse.

    Raises ScriptError, and RunError when it runs. Source: RFC 8579 section 4.
    """
    use = call.text(":specialuse")
    if isinstance(use, str) and not use.startswith("\\"):
        raise ScriptError(f'{use!r} is no special use: write "\\\\{use}"', call.place_of(":specialuse"))

    def directory(run: Run, name: str) -> str:
        run.spend(LOOKUP_STEPS)
        special = None if use is None else run.look_up().special_folder(expanded(use, run).lower())
        try:
            return run.around.folder(name if special is None else special)
        except ValueError as error:
            raise RunError(f"{call.node.name}: {error}") from None

    return directory


def address_argument(call: Call, argument: int | str) -> Callable[[Run], tuple[str, Address]]:
    """What gives the display name and the address in an argument. Raises ScriptError, and RunError when it runs."""
    strings = call.strings(argument)
    if len(strings) != 1:
        raise ScriptError(f"{call.node.name} needs one address here", call.place_of(argument))
    text, place = strings[0]
    if isinstance(text, str):
        fixed = checked_address(text, place)
        return lambda _run: fixed
    return lambda run: address_at_run(expanded(text, run), call.node.name, run)


def checked_address(text: str, place: int) -> tuple[str, Address]:
    """See strict_address(). Raises ScriptError."""
    try:
        return strict_address(text)
    except ValueError as error:
        raise ScriptError(str(error), place) from None


def address_at_run(text: str, command: str, run: Run) -> tuple[str, Address]:
    """See strict_address(). Raises RunError."""
    run.spend(ADDRESS_STEPS + len(text))
    try:
        return strict_address(text)
    except ValueError as error:
        raise RunError(f"{command}: {error}") from None


def author_of(
    author: Callable[[Run], tuple[str, Address]] | None, run: Run, own: dict[str, Address], substitute: Address
) -> str:
    """The value of From: what :from says if that is one of the user's own addresses, else the substitute.

    Raises RunError.
    """
    name, address = author(run) if author else ("", substitute)
    if comparable(address) in own:
        return mailbox_text(name, address)
    if author:
        log.warning("author-not-used", author=address, user=run.around.recipient.userid)
    return mailbox_text("", substitute)


def redirect(call: Call) -> Step:
    """The command redirect (RFC 5228 section 4.2, RFC 3894)."""
    address, copy = address_argument(call, 0), call.has(":copy")

    def run_redirect(run: Run) -> None:
        recipient, around = address(run)[1], run.around
        run.spend(ADDRESS_STEPS + (0 if recipient.domain.isascii() else DOMAIN_STEPS * len(recipient.domain)))
        header = run.changed_header()
        if comparable(recipient) in own_addresses(around.recipient, around.config):
            if not copy:  # it would only come back
                run.actions.keep(run.flags, header)
            return

        def composed_redirect(message: Message) -> Message:
            return message.with_header(header) if header else message

        record = f"redirect {comparable(recipient)}"
        run.actions.redirect(Outgoing("redirect", [recipient], around.reverse_path, composed_redirect, record), copy)

    return run_redirect


def reject(call: Call) -> Step:
    """The commands reject and ereject (RFC 5429 sections 2.1 and 2.2)."""
    text, may_report = call.text(0) or "", call.node.name == "reject"

    def run_reject(run: Run) -> None:
        reason, around = expanded(text, run).replace("\r\n", "\n").strip(), run.around
        is_tellable = reason.isascii()
        config, sender, recipient = (
            around.config,
            around.reverse_path,
            complete_address(around.recipient, around.config),
        )
        may_be_sent = may_report and not is_from_machine(run.subject.message.header, sender)
        if may_be_sent and sender and not (config.sieve_use_lmtp_reject and is_tellable):
            sender = sender if sender.domain else Address(sender.local, config.servername)
            report = Outgoing(
                "reject",
                [sender],
                None,
                lambda message: rejection_report(message, sender, recipient, reason, config),
                "reject",
            )
            run.actions.reject("", report)
        else:
            run.actions.reject(reply_text(reason) if is_tellable and reason else PLAIN_REASON, None)

    return run_reject


def reply_text(reason: str) -> str:
    """A user's text as that of a reply: long lines become several (RFC 5429 section 2.5)."""
    lines: list[str] = []
    for line in reason.replace("\t", " ").split("\n"):
        rest = line.strip()
        while len(rest) > REPLY_LINE:
            cut = rest.rfind(" ", 0, REPLY_LINE)
            cut = cut if cut > 0 else REPLY_LINE
            lines.append(rest[:cut])
            rest = rest[cut:].strip()
        lines.append(rest)
    return "\n".join(lines[:REPLY_LINES])


def vacation(call: Call) -> Step:
    """The command vacation (RFC 5230, RFC 6131)."""
    reason, is_entity = call.text(0) or "", call.has(":mime")
    subject, handle = call.text(":subject") or "", call.text(":handle")
    author = address_argument(call, ":from") if call.has(":from") else None
    others = [
        (text, checked_address(text, place)[1] if isinstance(text, str) else None)
        for text, place in call.strings(":addresses")
    ]
    if is_entity and isinstance(reason, str):
        check_entity(reason, call.place_of(0))
    period, filing = period_of(call), filing_of(call)

    def run_vacation(run: Run) -> None:
        config, sender = run.around.config, run.around.reverse_path
        if run.actions.has_answered():
            return
        own = own_addresses(run.around.recipient, config)
        for text, fixed in others:
            other = fixed or address_at_run(expanded(text, run), "vacation", run)[1]
            own.setdefault(comparable(other), other)
        text, title = expanded(reason, run), expanded(subject, run)
        header = run.subject.message.header  # as it arrived: a script cannot make an answer due
        run.spend(len(header.octets) // ANSWER_OCTETS)
        withheld, addressed = reason_for_silence(header, sender), addressee(header, own)
        if not withheld and sender and comparable(sender) in own:
            withheld = f"the sender <{sender}> is the user"
        if not withheld and not addressed:
            withheld = "the message is not addressed to the user"
        from_value = author_of(author, run, own, addressed or complete_address(run.around.recipient, config))
        seconds = period(config)
        what = (
            expanded(handle, run)
            if handle is not None
            else "\0".join(("text", title, from_value if author else "", str(is_entity), text))
        )
        record = shortened(f"vacation {comparable(sender) if sender else ''} {what}")
        if not withheld and seconds and run.look_up().has_seen(record):
            withheld = ANSWERED_LATELY
        entity = mime_entity(text) if is_entity else text_entity(text)
        to = [sender if sender.domain else Address(sender.local, config.servername)] if sender else []
        answer = Outgoing(
            "vacation",
            to,
            None,
            lambda message: vacation_answer(message, to[0], from_value, title, entity, config),
            record if seconds else "",
            seconds,
        )
        answer.withheld, answer.filing = withheld, filing(run)
        run.actions.send(answer)

    return run_vacation


def check_entity(text: str, place: int) -> None:
    """Raises ScriptError unless the text is an entity of MIME."""
    octets = lines_of_text(text)
    header = Header.of(octets)
    if not header.octets and not octets.startswith(LF):
        text = "with :mime the text begins with fields such as Content-Type, and an empty line follows them"
        raise ScriptError(text, place)
    if not header.octets.isascii():
        raise ScriptError("the fields of an entity must be ASCII", place)


def period_of(call: Call) -> Callable[[Config], int]:
    """For how many seconds nobody gets the answer again."""
    days, seconds = call.number(":days"), call.number(":seconds")

    def period(config: Config) -> int:
        least = config.sieve_vacation_min_response if seconds is None else config.sieve_vacation_min_seconds
        wanted = DAY * (DEFAULT_DAYS if days is None else days) if seconds is None else seconds
        return min(max(wanted, least), max(config.sieve_vacation_max_response, least))

    return period


def filing_of(call: Call) -> Callable[[Run], Filing | None]:
    """Where a copy of what is sent goes, as the tag :fcc says (RFC 8580). Raises ScriptError."""
    if not call.has(":fcc"):
        for tag in (":create", ":flags", ":specialuse"):
            if call.has(tag):
                raise ScriptError(f"{tag} stands here only with :fcc", call.tag_place(tag))
        return lambda _run: None
    name, flags, directory = call.text(":fcc") or "", flags_of(call), directory_of(call)
    has_flags = call.has(":flags")

    def filing(run: Run) -> Filing:
        folder = directory(run, expanded(name, run))
        copy = Filing(folder, tuple(flags(run)) if has_flags else (), None, 0)
        copy.is_named = True
        return copy

    return filing


def notify(call: Call) -> Step:
    """The command notify (RFC 5435 section 3)."""
    author = address_argument(call, ":from") if call.has(":from") else None
    message_text, importance = call.text(":message") or "", call.text(":importance")
    if isinstance(importance, str) and importance not in IMPORTANCE:
        raise ScriptError(wrong_importance(importance), call.place_of(":importance"))
    for option_text, place in call.strings(":options"):
        if isinstance(option_text, str) and not option_text.partition("=")[1]:
            raise ScriptError(f'{option_text!r} is no option: write "name=value"', place)
    method = call.text(0) or ""
    fixed = checked_method(method, call.place_of(0)) if isinstance(method, str) else None
    filing = filing_of(call)

    def run_notify(run: Run) -> None:
        config, owner = run.around.config, complete_address(run.around.recipient, run.around.config)
        uri = expanded(method, run)
        run.spend(LOOKUP_STEPS + len(uri))
        try:
            mailto = fixed or Mailto(uri)
        except ValueError as error:
            raise RunError(f"notify: {error}") from None
        from_value = author_of(author, run, own_addresses(run.around.recipient, config), owner)
        weight = expanded(importance, run) if importance is not None else "2"
        if weight not in IMPORTANCE:
            raise RunError(f"notify: {wrong_importance(weight)}")
        header = run.subject.message.header
        text = expanded(message_text, run)
        run.spend(len(header.octets) // ANSWER_OCTETS)
        mail = Outgoing(
            "notify",
            mailto.recipients,
            owner if run.around.reverse_path else None,
            lambda message: notification(message, mailto, from_value, owner, text, weight, config),
            shortened(f"notify {uri} {text}"),
        )
        for start, end in header.spans(b"auto-submitted"):
            value = raw_text(header.octets[start:end].partition(b":")[2]).strip()
            if is_automatic(value):  # RFC 5436 section 2.7.1
                mail.withheld = f"Auto-Submitted: {value[:SUBJECT_LIMIT]}"
        mail.filing = filing(run)
        run.actions.send(mail)

    return run_notify


def wrong_importance(importance: str) -> str:
    """What to say about an importance that there is not."""
    return f'{importance!r} is no importance: write "1" (high), "2" or "3"'


def checked_method(uri: str, place: int) -> Mailto:
    """The method of a notification. Raises ScriptError."""
    try:
        return Mailto(uri)
    except ValueError as error:
        raise ScriptError(str(error), place) from None


def is_method(uri: str) -> bool:
    """Whether notify can use the method."""
    try:
        Mailto(uri)
    except ValueError:
        return False
    return True


def methods_are_valid(call: Call) -> Check:
    """The test valid_notify_method (RFC 5435 section 4)."""
    uris = all_of(call.texts(0))
    return lambda run: all(map(is_method, run.billed(uris(run))))


def method_can(call: Call) -> Check:
    """The test notify_method_capability (RFC 5435 section 5): nobody knows whether a recipient of mail is online."""
    uri, capability, matcher = call.text(0) or "", call.text(1) or "", call.matcher(2)

    def run_capability(run: Run) -> bool:
        method = expanded(uri, run)
        run.spend(LOOKUP_STEPS + len(method))
        is_known = expanded(capability, run).lower() == "online" and is_method(method)
        return is_known and matcher.accepts(run, ["maybe"])

    return run_capability


# ======================================================================
# Sieve: commands
#
# Owns the commands of scripts, alike, and the table of commands, tests and tags.
# Must not know files, and how mail is stored.
# ======================================================================

PRECEDENCE = {  # RFC 5229 section 4.1, draft-ietf-sieve-regex section 4
    **dict.fromkeys((":lower", ":upper"), 40),
    **dict.fromkeys((":lowerfirst", ":upperfirst"), 30),
    **dict.fromkeys((":quotewildcard", ":quoteregex"), 20),
    ":encodeurl": 15,  # RFC 5435 section 6
    ":length": 10,
}
UNRESERVED = frozenset((LETTERS + DIGITS + "-._~").encode())  # RFC 3986 section 2.3
WILDCARDS = str.maketrans({each: f"\\{each}" for each in "*?\\"})
REGEX_SPECIALS = str.maketrans({each: f"\\{each}" for each in "\\.[]{}()*+?|^$"})


def url_encoded(text: str) -> str:
    """Text with percent encoding (RFC 3986 section 2.1), cut between characters at VARIABLE_LIMIT."""
    pieces, room = [], VARIABLE_LIMIT
    for character in text[:VARIABLE_LIMIT]:
        octets = character.encode("utf-8", "surrogateescape")
        piece = "".join(chr(octet) if octet in UNRESERVED else f"%{octet:02X}" for octet in octets)
        room -= len(piece)
        if room < 0:
            break
        pieces.append(piece)
    return "".join(pieces)


MODIFIERS: dict[str, Callable[[str], str]] = {
    ":lower": ascii_lower,
    ":upper": ascii_upper,
    ":lowerfirst": lambda text: ascii_lower(text[:1]) + text[1:],
    ":upperfirst": lambda text: ascii_upper(text[:1]) + text[1:],
    ":quotewildcard": lambda text: text.translate(WILDCARDS),
    ":quoteregex": lambda text: text.translate(REGEX_SPECIALS),
    ":length": lambda text: str(len(text)),
    ":encodeurl": url_encoded,
}


def require(call: Call) -> Step:
    """The command require (RFC 5228 section 3.2)."""
    compiler = call.compiler
    known = compiler.language.capabilities
    for capability, place in call.constants(0):
        if capability not in known:
            text = f"there is no capability {capability!r} here{similar_word(capability, known)}"
            raise ScriptError(text, place)
        compiler.enable(capability)
    if not compiler.may_require:
        raise ScriptError("require must stand before all other commands: move it up", call.node.start)
    return lambda _run: None


def stop(_call: Call) -> Step:
    """The command stop (RFC 5228 section 3.3)."""

    def run_stop(_run: Run) -> None:
        raise ScriptEnd

    return run_stop


def keep(call: Call) -> Step:
    """The command keep (RFC 5228 section 4.3)."""
    flags = flags_of(call)
    return lambda run: run.actions.keep(flags(run), run.changed_header())


def discard(_call: Call) -> Step:
    """The command discard (RFC 5228 section 4.4)."""
    return lambda run: run.actions.discard()


def file_into(call: Call) -> Step:
    """The command fileinto (RFC 5228 section 4.1, RFC 3894, RFC 5232, RFC 5490, RFC 8579).

    A missing folder is made in any case, with :create and without.
    """
    name, flags, directory, copy = call.text(0) or "", flags_of(call), directory_of(call), call.has(":copy")

    def run_fileinto(run: Run) -> None:
        folder = directory(run, expanded(name, run))
        run.actions.file(folder, flags(run), run.changed_header(), copy)

    return run_fileinto


def change_flags(change: Callable[[list[str], list[str]], list[str]]) -> Callable[[Call], Step]:
    """The commands setflag, addflag and removeflag (RFC 5232 section 3). change: of the old and the given flags."""

    def compiled(call: Call) -> Step:
        variables, lists, fixed = flag_variables(call), all_of(call.texts(1)), call.fixed(1)
        constant = None if fixed is None else normalized_flags(fixed)

        def run_flags(run: Run) -> None:
            given = normalized_flags(run.billed(lists(run))) if constant is None else constant
            run.spend(COMMAND_STEPS * (len(given) + len(run.flags)))
            if not variables:
                run.flags = change(run.flags, given)
            for name, shared in variables:
                old = (run.shared_variables if shared else run.variables).get(name, "")
                run.set_variable(name, " ".join(change(normalized_flags(run.billed([old])), given)), shared)

        return run_flags

    return compiled


def without_flags(flags: list[str], removed: list[str]) -> list[str]:
    """The flags that are not among the removed ones."""
    names = {flag.lower() for flag in removed}
    return [flag for flag in flags if flag.lower() not in names]


def set_variable(call: Call) -> Step:
    """The command set (RFC 5229 section 4)."""
    name, shared = call.compiler.variable(call.constant(0), call.place_of(0))
    value, modify = call.text(1) or "", modifier_of(call)
    return lambda run: run.set_variable(name, modify(expanded(value, run)), shared)


def modifier_of(call: Call) -> Callable[[str], str]:
    """What the modifiers of a command do, those of higher precedence first."""
    given = sorted(filter(call.has, PRECEDENCE), key=PRECEDENCE.__getitem__, reverse=True)
    functions = [MODIFIERS[tag] for tag in given]

    def modify(text: str) -> str:
        for function in functions:
            text = function(text)
        return text

    return modify


def include(call: Call) -> Step:
    """The command include (RFC 6609 section 3.1)."""
    name, place = call.constant(0), call.first_of(":personal", ":global") or "personal"
    once, optional = call.has(":once"), call.has(":optional")
    if not is_safe_name(name):
        raise ScriptError(f"{name!r} is no name of a script", call.place_of(0))

    def run_include(run: Run) -> None:
        run.spend(INCLUDE_STEPS)
        script = run.around.script(place, name)
        if script:
            run.include(script, once)
        elif not optional:
            raise RunError(f"include: there is no {place} script {name!r}")

    return run_include


def return_(_call: Call) -> Step:
    """The command return (RFC 6609 section 3.3)."""

    def run_return(_run: Run) -> None:
        raise Return

    return run_return


def global_(call: Call) -> Step:
    """The command global (RFC 6609 section 3.4.1)."""
    call.compiler.demand("variables", "global", call.node.start)
    for name, place in call.constants(0):
        if "." in name:
            raise ScriptError(f"{name!r} must be the name of a variable without a dot", place)
        if name.lower() in call.compiler.own:
            raise ScriptError(f"{name!r} has been used already: move the command global up", place)
        call.compiler.shared.add(call.compiler.variable(name, place)[0])
    return lambda _run: None


def error_(call: Call) -> Step:
    """The command error (RFC 5463 section 5)."""
    text = call.text(0) or ""

    def run_error(run: Run) -> None:
        raise RunError(expanded(text, run))

    return run_error


def for_every_part(call: Call) -> Step:
    """The command foreverypart (RFC 5703 section 3.1)."""
    name, compiler = call.constant(":name"), call.compiler
    compiler.loops.append(name)
    block = compiler.block(call.node.block or [])
    compiler.loops.pop()

    def run_loop(run: Run) -> None:
        outer = run.subject.part
        parts = iter(run.subject.here().walk())
        if outer:
            next(parts, None)  # the parts of a part do not have it among them
        try:
            for run.subject.part in parts:
                run.spend(PART_STEPS)
                block(run)
        except Break as ended:
            if ended.name not in ("", name):
                raise
        finally:
            run.subject.part = outer

    return run_loop


def break_(call: Call) -> Step:
    """The command break (RFC 5703 section 3.2)."""
    name = call.constant(":name")
    if not call.compiler.loops:
        raise ScriptError("break must stand in the block of foreverypart", call.node.start)
    if name and name not in call.compiler.loops:
        raise ScriptError(f"no foreverypart around this has the name {name!r}", call.place_of(":name"))

    def run_break(_run: Run) -> None:
        raise Break(name)

    return run_break


def extract_text(call: Call) -> Step:
    """The command extracttext (RFC 5703 section 7)."""
    call.compiler.demand("variables", "extracttext", call.node.start)
    if not call.compiler.loops:
        raise ScriptError("extracttext must stand in the block of foreverypart", call.node.start)
    name, shared = call.compiler.variable(call.constant(0), call.place_of(0))
    first, modify = call.number(":first"), modifier_of(call)

    def run_extract(run: Run) -> None:
        part = run.subject.here()
        text = "" if part.content_type.type in ("multipart", "message") else run.subject.text_of(part)
        run.set_variable(name, modify(text[: VARIABLE_LIMIT if first is None else first]), shared)

    return run_extract


def add_header(call: Call) -> Step:
    """The command addheader (RFC 5293 section 4)."""
    name, value, last = call.field_name(0), call.text(1) or "", call.has(":last")

    def run_addheader(run: Run) -> None:
        field, text = expanded(name, run), expanded(value, run)
        if not is_field_name(field):
            raise RunError(f"addheader: {field!r} is no name of a header field")
        if field.lower() not in run.around.config.sieve_editheader_protected:
            run.spend(len(run.subject.header.octets) // STEP_OCTETS)
            run.subject.add_field(field, text, last)

    return run_addheader


def delete_header(call: Call) -> Step:
    """The command deleteheader (RFC 5293 section 5)."""
    field_name = call.field_name(0 if call.given(0) else 1)
    has_values = call.given(0)
    matcher, pick = call.matcher(1) if has_values else None, pick_of(call)

    def run_deleteheader(run: Run) -> None:
        field = expanded(field_name, run)
        header = run.subject.header
        if not is_field_name(field) or field.lower() in run.around.config.sieve_editheader_protected:
            return
        spans = list(header.spans(field.lower().encode()))
        run.spend(len(header.octets) // STEP_OCTETS + COMMAND_STEPS * len(spans))
        spans = pick(spans) if pick else spans
        if matcher:
            spans = [span for span in spans if matcher.accepts(run, [value_at(header, span)])]
        run.subject.remove_fields(spans)

    return run_deleteheader


def value_at(header: Header, span: tuple[int, int]) -> str:
    """The decoded value of the field at that place."""
    return unstructured(header.octets[slice(*span)].partition(b":")[2])


# ----------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------

MATCH_TAGS = (
    Tag(":comparator", value=STRING),
    Tag(":is", group="match type"),
    Tag(":contains", group="match type"),
    Tag(":matches", group="match type"),
    Tag(":value", "relational", STRING, group="match type"),
    Tag(":count", "relational", STRING, group="match type"),
    Tag(":regex", "regex", group="match type"),
)
ADDRESS_PART_TAGS = (
    Tag(":all", group="address part"),
    Tag(":localpart", group="address part"),
    Tag(":domain", group="address part"),
    Tag(":user", "subaddress", group="address part"),
    Tag(":detail", "subaddress", group="address part"),
)
INDEX_TAGS = (Tag(":index", "index", NUMBER), Tag(":last", "index"))
MIME_TAGS = (Tag(":mime", "mime"), Tag(":anychild", "mime"))
CONTENT_TYPE_TAGS = (
    Tag(":type", "mime", group="mime option"),
    Tag(":subtype", "mime", group="mime option"),
    Tag(":contenttype", "mime", group="mime option"),
    Tag(":param", "mime", STRINGS, group="mime option"),
)
ZONE_TAGS = (Tag(":zone", value=STRING, group="zone"), Tag(":originalzone", group="zone"))
MODIFIER_TAGS = (
    Tag(":lower", group="case"),
    Tag(":upper", group="case"),
    Tag(":lowerfirst", group="first letter"),
    Tag(":upperfirst", group="first letter"),
    Tag(":quotewildcard", group="quoting"),
    Tag(":quoteregex", "regex", group="quoting"),
    Tag(":encodeurl", "enotify", group="encoding"),
    Tag(":length"),
)
FLAGS_TAG = Tag(":flags", "imap4flags", STRINGS)
FOLDER_TAGS = (Tag(":create", "mailbox"), FLAGS_TAG, Tag(":specialuse", "special-use", STRING))
FCC_TAGS = (Tag(":fcc", "fcc", STRING), *FOLDER_TAGS)

COMMANDS = (
    Word(
        "addflag",
        "imap4flags",
        (STRINGS, STRINGS),
        change_flags(lambda old, new: normalized_flags([*old, *new])),
        optional=1,
    ),
    Word("addheader", "editheader", (STRING, STRING), add_header, (Tag(":last"),)),
    Word("break", "foreverypart", (), break_, (Tag(":name", value=STRING),)),
    Word(
        "deleteheader",
        "editheader",
        (STRING, STRINGS),
        delete_header,
        (*MATCH_TAGS, Tag(":index", value=NUMBER), Tag(":last")),
        optional=1,
    ),
    Word("discard", "", (), discard),
    Word("ereject", "ereject", (STRING,), reject),
    Word("error", "ihave", (STRING,), error_),
    Word("extracttext", "extracttext", (STRING,), extract_text, (Tag(":first", value=NUMBER), *MODIFIER_TAGS)),
    Word(
        "fileinto",
        "fileinto",
        (STRING,),
        file_into,
        (Tag(":copy", "copy"), *FOLDER_TAGS),
    ),
    Word("foreverypart", "foreverypart", (), for_every_part, (Tag(":name", value=STRING),), has_block=True),
    Word("global", "include", (STRINGS,), global_),
    Word(
        "include",
        "include",
        (STRING,),
        include,
        (Tag(":personal", group="place"), Tag(":global", group="place"), Tag(":once"), Tag(":optional")),
    ),
    Word("keep", "", (), keep, (FLAGS_TAG,)),
    Word(
        "notify",
        "enotify",
        (STRING,),
        notify,
        (
            Tag(":from", value=STRING),
            Tag(":importance", value=STRING),
            Tag(":options", value=STRINGS),
            Tag(":message", value=STRING),
            *FCC_TAGS,
        ),
    ),
    Word("redirect", "", (STRING,), redirect, (Tag(":copy", "copy"),)),
    Word("reject", "reject", (STRING,), reject),
    Word("removeflag", "imap4flags", (STRINGS, STRINGS), change_flags(without_flags), optional=1),
    Word("require", "", (STRINGS,), require),
    Word("return", "include", (), return_),
    Word("set", "variables", (STRING, STRING), set_variable, MODIFIER_TAGS),
    Word("setflag", "imap4flags", (STRINGS, STRINGS), change_flags(lambda _old, new: new), optional=1),
    Word("stop", "", (), stop),
    Word(
        "vacation",
        "vacation",
        (STRING,),
        vacation,
        (
            Tag(":days", value=NUMBER, group="period"),
            Tag(":seconds", "vacation-seconds", NUMBER, group="period"),
            Tag(":subject", value=STRING),
            Tag(":from", value=STRING),
            Tag(":addresses", value=STRINGS),
            Tag(":mime"),
            Tag(":handle", value=STRING),
            *FCC_TAGS,
        ),
    ),
)
TESTS = (
    Word(
        "address", "", (STRINGS, STRINGS), addresses_match, (*MATCH_TAGS, *ADDRESS_PART_TAGS, *INDEX_TAGS, *MIME_TAGS)
    ),
    Word("allof", "", (), conjunction, tests=MANY),
    Word("anyof", "", (), disjunction, tests=MANY),
    Word(
        "body",
        "body",
        (STRINGS,),
        body_matches,
        (
            *MATCH_TAGS,
            Tag(":raw", group="transform"),
            Tag(":content", value=STRINGS, group="transform"),
            Tag(":text", group="transform"),
        ),
    ),
    Word("currentdate", "date", (STRING, STRINGS), current_date_matches, (*MATCH_TAGS, ZONE_TAGS[0])),
    Word("date", "date", (STRING, STRING, STRINGS), date_matches, (*MATCH_TAGS, *ZONE_TAGS, *INDEX_TAGS)),
    Word(
        "duplicate",
        "duplicate",
        (),
        is_duplicate,
        (
            Tag(":handle", value=STRING),
            Tag(":header", value=STRING, group="id"),
            Tag(":uniqueid", value=STRING, group="id"),
            Tag(":seconds", value=NUMBER),
            Tag(":last"),
        ),
    ),
    Word("envelope", "envelope", (STRINGS, STRINGS), envelope_matches, (*MATCH_TAGS, *ADDRESS_PART_TAGS)),
    Word("environment", "environment", (STRING, STRINGS), environment_matches, MATCH_TAGS),
    Word("exists", "", (STRINGS,), fields_exist, MIME_TAGS),
    Word("false", "", (), always_false),
    Word("hasflag", "imap4flags", (STRINGS, STRINGS), flags_match, MATCH_TAGS, optional=1),
    Word("header", "", (STRINGS, STRINGS), fields_match, (*MATCH_TAGS, *INDEX_TAGS, *MIME_TAGS, *CONTENT_TYPE_TAGS)),
    Word("ihave", "ihave", (STRINGS,), has_capability),
    Word("mailboxexists", "mailbox", (STRINGS,), folders_exist),
    Word("not", "", (), negation, tests=1),
    Word("notify_method_capability", "enotify", (STRING, STRING, STRINGS), method_can, MATCH_TAGS),
    Word(
        "size", "", (), size_is, (Tag(":over", value=NUMBER, group="size"), Tag(":under", value=NUMBER, group="size"))
    ),
    Word("spamtest", "spamtest", (STRING,), spam_matches, (*MATCH_TAGS, Tag(":percent", "spamtestplus"))),
    Word("specialuse_exists", "special-use", (STRING, STRINGS), special_uses_exist, optional=1),
    Word("string", "variables", (STRINGS, STRINGS), strings_match, MATCH_TAGS),
    Word("true", "", (), always_true),
    Word("valid_notify_method", "enotify", (STRINGS,), methods_are_valid),
    Word("virustest", "virustest", (STRING,), virus_matches, MATCH_TAGS),
)
# Capabilities that stand for something else than a row or a tag.
OTHER_CAPABILITIES = (
    *("encoded-character", "fileinto", "include", "mime", "spamtestplus", "vacation-seconds"),
    *map("comparator-".__add__, COMPARATORS),
)


def language_for(extensions: Sequence[str]) -> Language:
    """The language that scripts may use. extensions: the capabilities allowed; () for all that this host can have.

    Comparators are always allowed.
    """
    capabilities = {word.capability for word in (*COMMANDS, *TESTS)} | set(OTHER_CAPABILITIES)
    capabilities |= {tag.capability for word in (*COMMANDS, *TESTS) for tag in word.tags.values()}
    capabilities.discard("")
    if not has_regex():
        capabilities.discard("regex")
    if extensions:
        capabilities &= {*extensions, *map("comparator-".__add__, COMPARATORS)}
    return Language(COMMANDS, TESTS, capabilities)


# ======================================================================
# Filters
#
# Owns whose scripts run for a recipient, in which order, what they may ask, and
# whom an error is told.
# Must not know the syntax of scripts, and how mail is stored.
# ======================================================================

KEPT_LIMIT = 512 * 1024  # octets of scripts that a process keeps compiled; each takes a hundred times its size at worst
SCRIPT_LOG_LIMIT = 64 * 1024  # octets of the file in which a user finds the errors of a script
SCRIPT_SUFFIX = ".sieve"
CYRUS_SUFFIX, COMPILED_SUFFIX, CYRUS_ACTIVE = ".script", ".bc", "defaultbc"
SCORE_LENGTH_LIMIT = 1000  # characters of a field in which a spam score is looked for


class ScriptUnreadable(Exception):
    """A script cannot be read for now. script: its path. The text has it, too, and says why."""

    def __init__(self, script: str, error: Exception) -> None:
        super().__init__(with_path(script, error))
        self.script = script


class ScriptFiles:
    """Reads and compiles scripts, and keeps them until their files change."""

    def __init__(self, config: Config, traced: bool) -> None:
        """traced: whether each test of the scripts reports its result."""
        self._config, self._traced = config, traced
        self._language: Language | None = None
        self._kept: dict[tuple[str, int], tuple[tuple[int, ...], Script | ScriptErrors, int]] = {}

    def load(self, path: str, identity: Identity) -> Script | None:
        """The script in a file; None if it is missing. identity: whose rights are needed to read it.

        Raises ScriptUnreadable and ScriptErrors.
        """
        try:
            with identity:
                return self._load(path, identity)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise ScriptUnreadable(path, error) from None

    def _load(self, path: str, identity: Identity) -> Script:
        """See load(). Raises OSError, ScriptUnreadable and ScriptErrors."""
        key = path, identity.uid
        kept = self._kept.get(key)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ScriptUnreadable(path, ValueError("is no plain file"))
        if not kept or kept[0] != state_of(status):
            octets, state = self._read(path)
            self._kept.pop(key, None)
            while self._kept and sum(size for _, _, size in self._kept.values()) + len(octets) > KEPT_LIMIT:
                del self._kept[next(iter(self._kept))]
            kept = self._kept[key] = state, self._compile(octets, path), len(octets)
        if isinstance(kept[1], ScriptErrors):
            raise kept[1]
        return kept[1]

    def _read(self, path: str) -> tuple[bytes, tuple[int, ...]]:
        """The content of a file and its state. Raises OSError."""
        # The user may put something else there meanwhile, such as a FIFO or a terminal.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            with PathInErrors(path), open(fd, "rb", closefd=False) as stream:
                return stream.read(self._config.sieve_maxscriptsize + 1), state_of(os.fstat(fd))
        finally:
            os.close(fd)

    def _compile(self, octets: bytes, path: str) -> Script | ScriptErrors:
        import gc

        self._language = self._language or language_for(self._config.sieve_extensions)
        gc.disable()  # a large script makes many objects, none of which is garbage
        try:
            return Compiler(self._language, self._config.sieve_maxscriptsize, self._traced).compile(octets, path)
        except ScriptErrors as errors:
            return errors
        finally:
            gc.enable()


def state_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes whenever a file is changed or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Occasion:
    """The delivery of a message to one recipient, as the scripts see it: a Surroundings.

    default_folder: the directory of the folder where a keep goes. files, records: where scripts and records are; None
    without any. pending: mailboxes and records that the other recipients of the transaction make.
    """

    def __init__(
        self, mailbox: Maildir, recipient: Recipient, reverse_path: Address | None, default_folder: str, config: Config
    ) -> None:
        self.mailbox, self.recipient, self.reverse_path = mailbox, recipient, reverse_path
        self.default_folder, self.config = default_folder, config
        self.files: ScriptFiles | None = None
        self.records: Records | None = None
        self.pending: set[tuple[str, str]] = set()

    def folder(self, name: str) -> str:
        """See Surroundings."""
        if not name:
            return INBOX
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if self.config.unixhierarchysep:
            if not all(name.split("/")):
                raise ValueError(f"{name!r} cannot be a folder's name: it has a slash too many")
            first, slash, rest = name.partition("/")
            name = f"INBOX/{rest}" if slash and first.upper() == "INBOX" else name
        try:
            return self.mailbox.resolve(name) or self.mailbox.new_folder(name)
        except OSError as error:
            raise ValueError(text_of(error)) from None

    def has_folder(self, name: str) -> bool:
        """See Surroundings."""
        try:
            return not name or self.mailbox.resolve(name) is not None
        except OSError as error:
            raise RunError(text_of(error)) from None

    def special_folder(self, use: str) -> str | None:
        """See Surroundings."""
        name = self.config.special_uses.get(use)
        return name if name is not None and self.has_folder(name) else None

    def script(self, place: str, name: str) -> Script | None:
        """See Surroundings."""
        if not self.files or (place == "personal" and not self.mailbox.script):
            return None
        try:
            if place == "global":
                folder = self.config.sieve_global_dir
                return self.files.load(f"{folder}/{name}{SCRIPT_SUFFIX}", Identity.of_process()) if folder else None
            with self.mailbox.identity:
                active = target_of_script(self.mailbox.script)
            suffix = CYRUS_SUFFIX if active.endswith(CYRUS_SUFFIX) else SCRIPT_SUFFIX
            return self.files.load(f"{os.path.dirname(active)}/{name}{suffix}", self.mailbox.identity)
        except ScriptErrors as errors:
            error = RunError(errors.errors[0][2])
            error.script, error.line = errors.name, errors.errors[0][0]
            raise error from None
        except (ScriptUnreadable, OSError) as error:
            raise RunError(f"include: {text_of(error)}") from None

    def has_seen(self, record: str) -> bool:
        """See Surroundings."""
        path = self.mailbox.path
        return (path, record) in self.pending or (self.records is not None and self.records.has(path, record))

    def environment(self, item: str) -> str | None:
        """See Surroundings."""
        host = self.config.servername
        return {
            "domain": host.partition(".")[2],
            "host": host,
            "location": "MDA",
            "name": "lmtpd",
            "phase": "during",
            "remote-host": "",
            "remote-ip": "",
            "version": __version__,
        }.get(item)

    def score(self, subject: Subject, of: str, best: int) -> str | None:
        """See Surroundings."""
        return score_of(subject, of, best, self.config)


def target_of_script(path: str) -> str:
    """The source of the script that a path leads to: Cyrus' link leads to the compiled one. Raises OSError."""
    target = os.path.realpath(path)
    return target.removesuffix(COMPILED_SUFFIX) + CYRUS_SUFFIX if target.endswith(COMPILED_SUFFIX) else target


def score_of(subject: Subject, of: str, best: int, config: Config) -> str | None:
    """The result of the test spamtest or virustest, from 1 to best, or from 0 to 100 percent; None if it is unknown.

    Source: RFC 5235, Pigeonhole's documentation of the settings of these names.
    """
    prefix = f"sieve_{of}test"
    kind, texts = getattr(config, f"{prefix}_status_type"), config.test_texts[of]
    status = field_text(subject, getattr(config, f"{prefix}_status_header"))
    if status is None:
        return None
    if kind == "text":
        return next((str(number) for number, text in texts.items() if text == status), None)
    maximum = number_in(field_text(subject, getattr(config, f"{prefix}_max_header")) or "")
    maximum = maximum or number_in(getattr(config, f"{prefix}_max_value"))
    score = float(len(status)) if kind == "strlen" else number_in(status)
    if score is None or not maximum or maximum <= 0:
        return None
    share = min(max(score / maximum, 0.0), 1.0)
    return str(round(share * 100)) if best == 100 else str(1 + int(share * (best - 1)))


def field_text(subject: Subject, setting: str) -> str | None:
    """The value of the field in "Name" or, in "Name: regular expression", its first group; None if it is missing."""
    name, _, pattern = setting.partition(":")
    value = next(iter(subject.values(name.strip().lower())), None) if name else None
    if value is None or not pattern.strip():
        return value
    import re

    match = re.search(with_python_classes(pattern.strip()), value[:SCORE_LENGTH_LIMIT])
    return (match[1] if match.re.groups else match[0]) if match else None


def number_in(text: str) -> float | None:
    """A decimal number; None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < FOREVER else None


class Filtered:
    """What the scripts want for a message. scripts: the paths of those that ran.

    filings: its copies; none if it is discarded. outgoing: what is sent. rejection: the text of the reply if the
    message is rejected by one, "" if by a report; else None. records: what to record once they are stored, and for how
    many seconds. errors: each as (script, "line" or "line:column", text); then the message is kept. ms: milliseconds.
    """

    def __init__(self) -> None:
        self.scripts: list[str] = []
        self.filings: list[Filing] = []
        self.outgoing: list[Outgoing] = []
        self.rejection: str | None = None
        self.records: dict[str, int] = {}
        self.errors: list[tuple[str, str, str]] = []
        self.ms = 0.0

    def actions(self) -> str:
        """The actions in words."""
        filed = [" ".join([f"fileinto {folder_name(filing.folder)}", *filing.flags]) for filing in self.filings]
        rejected = ["reject"] if self.rejection else []
        return ", ".join([*rejected, *map(str, self.outgoing), *filed]) or "discard"


def site_scripts(path: str) -> list[str]:
    """The paths of the site's scripts: that path, or the scripts in that directory in the order of their names.

    Raises ScriptUnreadable.
    """
    if not os.path.isdir(path):
        return [path]
    try:
        return sorted(f"{path}/{name}" for name in os.listdir(path) if name.endswith(SCRIPT_SUFFIX))
    except OSError as error:
        raise ScriptUnreadable(path, error) from None


class Filters:
    """Runs the scripts for a recipient: the site's before, the user's or else the default, the site's after.

    Each hands the message on to the next while a keep is in effect at its end. report: see Run.
    """

    def __init__(
        self, config: Config, records: Records | None, report: Callable[[Script, int, str], None] | None
    ) -> None:
        self._config, self._records, self._report = config, records, report
        self._files = ScriptFiles(config, traced=report is not None)
        self._own = Identity.of_process()
        self._has_site_scripts = bool(config.sieve_before or config.sieve_default or config.sieve_after)

    def run(self, message: Message, occasion: Occasion) -> Filtered | None:
        """What the scripts want; None if there are none. After an error the message is kept.

        Raises OSError if the message cannot be read.
        """
        if not occasion.mailbox.script and not self._has_site_scripts:
            return None
        occasion.files, occasion.records = self._files, self._records
        started = time.monotonic()
        run, filtered = Run(Subject(message), occasion), Filtered()
        run.report = self._report
        try:
            for script in self._scripts(occasion.mailbox):
                filtered.scripts.append(script.name)
                run.execute(script)
                if not run.actions.keeps:
                    break
        except ScriptUnreadable as error:
            run.actions.fall_back()
            filtered.errors.append((error.script, "", str(error)))
        except ScriptErrors as errors:
            run.actions.fall_back()
            filtered.errors += [(errors.name, f"{line}:{column}", text) for line, column, text in errors.errors]
        except RunError as error:
            filtered.errors.append((error.script, str(error.line), error.text))
        except OSError:
            raise
        except Exception as error:  # a fault of the program must not keep mail out
            log.traceback("script-failed")
            run = Run(Subject(message), occasion)
            filtered.errors.append(("", "", f"internal error: {error!r}"))
        finally:
            run.subject.close()
        if not filtered.scripts and not filtered.errors:
            return None
        filtered.filings = run.actions.filings(run.flags, run.changed_header())
        filtered.outgoing, filtered.rejection = run.actions.outgoing(), run.actions.rejection
        filtered.records = run.records
        filtered.ms = round((time.monotonic() - started) * 1000, 1)
        return filtered

    def tell(self, filtered: Filtered, occasion: Occasion) -> None:
        """Logs what the scripts want, and their errors; those of the user's own also into a file beside the script."""
        for script, place, text in filtered.errors:
            log.error("script-error", script=script, line=place, cause=text)
            if place and occasion.mailbox.script:
                self._tell_user(script, f"{place}: {text}", occasion.mailbox)
        log.debug(
            "filtered",
            recipient=f"<{occasion.recipient.address}>",
            script=" ".join(filtered.scripts),
            actions=filtered.actions(),
            ms=filtered.ms,
        )

    def _scripts(self, mailbox: Maildir) -> Iterator[Script]:
        """The scripts in their order. Raises ScriptUnreadable and ScriptErrors."""
        config = self._config
        yield from self._site_script("sieve_before", config.sieve_before)
        user = self._user_script(mailbox)
        if user:
            yield user
        else:
            yield from self._site_script("sieve_default", config.sieve_default)
        yield from self._site_script("sieve_after", config.sieve_after)

    def _site_script(self, option: str, path: str) -> Iterator[Script]:
        """The script of the site in that file, or those in that directory in the order of their names.

        Raises ScriptUnreadable and ScriptErrors.
        """
        if not path:
            return
        for each in site_scripts(path):
            if script := self._files.load(each, self._own):
                yield script
            else:
                log.warning_once("script-missing", option=option, script=each)

    def _user_script(self, mailbox: Maildir) -> Script | None:
        """The user's script; None if there is none. Raises ScriptUnreadable and ScriptErrors."""
        path = mailbox.script
        if not path:
            return None
        if os.path.basename(path) == CYRUS_ACTIVE:
            try:
                with mailbox.identity:
                    path = target_of_script(path)
            except OSError as error:
                raise ScriptUnreadable(path, error) from None
        return self._files.load(path, mailbox.identity)

    def _tell_user(self, script: str, text: str, mailbox: Maildir) -> None:
        """Writes an error into a file beside the script, if that is one of the user's."""
        try:
            with mailbox.identity:
                path = os.path.realpath(script)
                if os.path.dirname(path) == os.path.dirname(target_of_script(mailbox.script)):
                    add_to_script_log(path, text)
        except OSError as error:
            log.debug("script-log-not-written", script=script, cause=error)


def report_test(script: Script, line: int, text: str) -> None:
    """Logs the result of a test."""
    log.debug("script-test", script=f"{script.name}:{line}", result=text)


def add_to_script_log(script: str, text: str) -> None:
    """Adds a line to the file in which the user finds the errors of a script: NAME.log beside it. Raises OSError."""
    path = f"{script.removesuffix(SCRIPT_SUFFIX).removesuffix(CYRUS_SUFFIX)}.log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | EXISTING_FILE, 0o600)
    try:
        status = os.fstat(fd)
        printable = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
        line = f"{date_time()} {os.path.basename(script)}:{printable}\n".encode("utf-8", "backslashreplace")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no plain file", path)
        if status.st_size + len(line) > SCRIPT_LOG_LIMIT:
            os.truncate(fd, 0)  # it begins anew: the latest errors are those that matter
        write_all(fd, line)
    finally:
        os.close(fd)


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
DELIVERED_ELSEWHERE = Reply(451, "4.2.0", "The message is being delivered by another process, try again later")
SENDING_FAILED = Reply(451, "4.4.0", "The message could not be sent on, try again later")
SENT_EXPIRY = (
    7 * DAY
)  # seconds after which no client sends a message again that it had to keep: RFC 5321 section 4.5.4.1
REDIRECT_EXPIRY = DAY  # seconds within which a message that comes again, by another way, is in a loop
VISITS_LIMIT = 4  # deliveries by this host, by its fields Received, of a message that it sends on
RECEIVED_LIMIT = 100  # fields Received of a message that is sent on: RFC 5321 section 6.3


class Destination:
    """A recipient's mailbox. detail: the folder's name; "" for the INBOX. ignores_quota: deliver even if over quota.

    substitute: the user who gets the mail in place of an unknown recipient; "" for none.
    """

    def __init__(
        self, recipient: Recipient, mailbox: Maildir, detail: str, ignores_quota: bool, substitute: str = ""
    ) -> None:
        self.recipient, self.mailbox, self.detail = recipient, mailbox, detail
        self.ignores_quota, self.substitute = ignores_quota, substitute


class Envelope:
    """A transaction's sender and recipients. reverse_path: None for <>. mailboxes: see remembered()."""

    def __init__(self, reverse_path: Address | None) -> None:
        self.reverse_path = reverse_path
        self.destinations: list[Destination] = []
        self.mailboxes: dict[tuple[str, tuple[int, int]], Maildir] = {}


class Placement:
    """A message on its way into one folder.

    key: the folder's name in records and in the log. event: the result, for the log. placed: the message in the folder,
    if it has been stored. subscribes: whether the owner is subscribed to a folder that is made for it. twin: an earlier
    placement in the same folder, of which this one is a duplicate. failure: the reply if it failed.
    """

    __slots__ = ("event", "failure", "flags", "folder", "key", "mailbox", "message", "placed", "subscribes", "twin")

    def __init__(
        self, message: Message, mailbox: Maildir, folder: str, flags: Sequence[str] = (), subscribes: bool = False
    ) -> None:
        self.message, self.mailbox, self.folder, self.flags = message, mailbox, folder, flags
        self.subscribes = subscribes
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
        self.event, self.failure = "not-delivered", reply


class Delivery:
    """The delivery of a message to one recipient. It has no placement if a script discards the message.

    failure: the client's reply if something has failed; else None. outgoing: what is sent once all is stored.
    rejection: the client's reply if the recipient rejects the message. records: what to record when all is done, and
    for how many seconds. message, folder: what a keep stores, and where. is_sent: whether the message has been sent on.
    scripts: the paths of those that ran.
    """

    __slots__ = (
        *("destination", "failure", "folder", "is_sent", "message", "outgoing", "placements", "records", "rejection"),
        *("reverse_path", "scripts"),
    )

    def __init__(self, destination: Destination, reverse_path: Address | None, message: Message) -> None:
        self.destination, self.reverse_path, self.message = destination, reverse_path, message
        self.placements: list[Placement] = []
        self.outgoing: list[Outgoing] = []
        self.records: dict[str, int] = {}
        self.failure: Reply | None = None
        self.rejection: Reply | None = None
        self.folder = INBOX
        self.is_sent = False
        self.scripts: Sequence[str] = ()

    @property
    def is_stored(self) -> bool:
        """Whether the mailbox has the message, perhaps from an earlier delivery."""
        return any(placement.is_stored or placement.event == "duplicate" for placement in self.placements)

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
        with log.context(recipient=f"<{address}>"):
            try:
                destination = self.destination(address, envelope, ignores_quota)
                self.check_quota(destination, size)
            except Exception as error:
                raise LmtpError(reply_to(error, self._config)) from None
        return destination

    def check_quota(self, destination: Destination, size: int) -> None:
        """Raises MailboxFull if the mailbox has no room. size: as in find(). Raises StoreError and LmtpError, too."""
        strict = self._config.lmtp_strict_quota
        # The folder matters only if some folders do not count.
        folder = self.folder_of(destination) if self._config.quota_exclude_folders else INBOX
        try:
            destination.mailbox.check_quota(folder, size if strict else 0, int(strict))
        except MailboxFull:
            if not destination.ignores_quota:
                raise

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

    def destination(self, address: Address, envelope: Envelope, ignores_quota: bool) -> Destination:
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
                return Destination(last, found[1], "", ignores_quota, found[0].userid)
            log.warning("fallback-user-unknown", user=userid)
        raise UserUnknown

    def _shared(self, recipient: Recipient, envelope: Envelope) -> Maildir | None:
        """The mailbox of the shared folders, if it has the recipient's; else None. Raises StoreError and LmtpError."""
        if not (shared := self._store.shared()):
            return None
        shared = remembered(shared, envelope)
        if not shared.exists():
            log.error("mailbox-not-accessible", mailbox=shared.path, cause="the directory does not exist")
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
    """Delivers messages to the mailboxes of their recipients.

    router: finds these. count: told each reply to a recipient and to a refused command, see Metrics.report().
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        self._config = config
        self.router = Router(config)
        self.count: Callable[[Reply, int], None] | None = None
        self._identity = Identity.of_process()
        self._records = records_of(config)
        self._submission = Submission(config)
        self._filters = Filters(config, self._records, report_test if config.debug else None)
        self._pending: set[tuple[str, str]] = set()

    def prepare(self) -> None:
        """Gets ready for many messages, before workers fork."""
        services = [prepare_services] if self._config.userdb == "dovecot" else []
        for prepare in (self._records.prepare, self._submission.prepare, *services):
            try:
                prepare()
            except (ImportError, OSError, MemoryError):
                continue  # the first use logs it

    def drafts(self, envelope: Envelope) -> Iterator[Draft]:
        """Spool files for a message that is too large for memory, one after the other on different file systems.

        A draft in a mailbox becomes the message there. If the mailboxes have different owners, the draft is in
        configdirectory, so that no user can write to another user's mail. Raises OSError if no draft can be made.
        """
        mailboxes = list(dict.fromkeys(destination.mailbox for destination in envelope.destinations))
        if len({mailbox.owner for mailbox in mailboxes}) > 1:
            draft = Directory(self._config.configdirectory, self._identity).new_draft("")
            try:
                draft.hide()
            except BaseException:
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
                log.warning("spooling-elsewhere", mailbox=mailbox.path, cause=error)
                continue
            try:
                device = draft.device()
            except BaseException:
                draft.discard()
                raise
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
        reverse_path, message = envelope.reverse_path, incoming.message
        deliveries = [Delivery(destination, reverse_path, message) for destination in envelope.destinations]
        if refusal := self.refusal(incoming):
            for delivery in deliveries:
                delivery.fail(refusal)
        else:
            self._deliver_all(message, deliveries)
        replies = []
        for delivery in deliveries:
            replies.append(reply := delivery.failure or delivery.rejection or delivered)
            log_delivery(delivery, reply, message, envelope, started)
            if self.count:
                self.count(reply, round((time.monotonic() - started) * 1000))
        return replies

    def plan(self, message: Message, delivery: Delivery) -> list[Placement]:
        """The placements of a message for one recipient, none if it is discarded; sets what else the scripts want.

        Raises StoreError, LmtpError and OSError.
        """
        destination, config = delivery.destination, self._config
        mailbox, recipient = destination.mailbox, destination.recipient
        mailbox.make()
        if config.lmtp_delivered_to:
            message = message.with_header(message.header.with_field(f"Delivered-To: {recipient.address}\n".encode()))
        folder = self.router.folder_of(destination)
        if recipient.is_shared:
            return [Placement(message, mailbox, folder)]
        delivery.message, delivery.folder = message, folder if config.sieve_subaddress_folder else INBOX
        occasion = Occasion(mailbox, recipient, delivery.reverse_path, delivery.folder, config)
        occasion.pending = self._pending
        filtered = self._filters.run(message, occasion)
        if not filtered:
            return [Placement(message, mailbox, folder)]
        self._filters.tell(filtered, occasion)
        delivery.records, delivery.outgoing = filtered.records, filtered.outgoing
        delivery.scripts = filtered.scripts
        if filtered.rejection:
            delivery.rejection = Reply(550, "5.7.1", filtered.rejection)
        self._pending.update((mailbox.path, record) for record in filtered.records)
        variants: dict[Header | None, Message] = {None: message}
        for filing in filtered.filings:
            if filing.header not in variants:
                variants[filing.header] = message.with_header(filing.header or message.header)
        return [
            Placement(variants[filing.header], mailbox, filing.folder, filing.flags, filing.is_named)
            for filing in filtered.filings
        ]

    def _deliver_all(self, message: Message, deliveries: Sequence[Delivery]) -> None:
        """Stores the message for all recipients, then sends what is to be sent; records both in the database."""
        placer = Placer(message, self._config, self._records)
        outbox = Outbox(message, placer, self._submission, self._records, self._config)
        self._pending.clear()
        batch: list[Delivery] = []
        waiting = 0
        for delivery in deliveries:
            with log.context(recipient=f"<{delivery.destination.recipient.address}>"):
                try:
                    delivery.placements = self.plan(message, delivery)
                    outbox.withhold(delivery)
                except Exception as error:
                    delivery.fail(reply_to(error, self._config, delivery.destination.mailbox.path))
            batch.append(delivery)
            waiting += len(delivery.placements)
            if waiting >= BATCH or delivery is deliveries[-1]:
                placer.store(batch, is_last=delivery is deliveries[-1])
                batch, waiting = [], 0
        for delivery in deliveries:
            if delivery.outgoing and not delivery.failure:
                outbox.send(delivery)
            if delivery.records and not delivery.failure:
                self._records.add(delivery.destination.mailbox.path, delivery.records)


class Placer:
    """Stores the copies of one message for all its recipients."""

    def __init__(self, message: Message, config: Config, records: Records) -> None:
        self._message, self._config, self._records = message, config, records
        self._first_in: dict[str, Placement] = {}  # the first placement in each folder, by its key
        self._claim = Claim()

    def store(self, deliveries: Sequence[Delivery], is_last: bool) -> None:
        """Stores the copies of some recipients, and records in the duplicate database which have been stored.

        is_last: whether no other recipients follow.
        """
        self._claim = self._new_claim(deliveries)
        stored: list[str] = []
        try:
            if self._claim.mailboxes:
                self._records.claim(self._claim)
            for delivery in deliveries:
                with log.context(recipient=f"<{delivery.destination.recipient.address}>"):
                    self._place(delivery, is_last and delivery is deliveries[-1])
            self._settle(deliveries)
            placements = [placement for delivery in deliveries for placement in delivery.placements]
            stored = [placement.key for placement in placements if placement.is_stored]
        finally:
            if self._claim.mailboxes:
                self._records.settle(self._claim, stored)

    def keep(self, delivery: Delivery) -> None:
        """Stores the message where a keep does, for what was to be done with it has failed."""
        delivery.placements.append(Placement(delivery.message, delivery.destination.mailbox, delivery.folder))
        later = Delivery(delivery.destination, delivery.reverse_path, delivery.message)
        later.placements = delivery.placements[-1:]
        self.store([later], is_last=False)
        if later.failure:
            delivery.fail(later.failure)

    def _new_claim(self, deliveries: Sequence[Delivery]) -> Claim:
        """A claim for the folders of these recipients; one for no folder if duplicates are not suppressed."""
        if not self._config.duplicatesuppression or not is_identified(self._message):
            return Claim()
        keys = [placement.key for delivery in deliveries for placement in delivery.placements]
        return Claim(self._message.message_id, self._message.date, list(dict.fromkeys(keys)))

    def _place(self, delivery: Delivery, is_last: bool) -> None:
        """Puts a recipient's copies into the folders that do not have the message yet, until one of them fails.

        is_last: whether no other recipient follows.
        """
        if delivery.failure:
            for placement in delivery.placements:
                placement.fail(delivery.failure)
            return
        for number, placement in enumerate(delivery.placements, 1):
            # The last placement of a message may take its draft away.
            may_move = is_last or placement.message is not self._message
            for later in delivery.placements[number:]:
                may_move = may_move and later.message is not placement.message
            try:
                self._place_one(placement, delivery.destination, may_move)
            except Exception as error:
                delivery.fail(reply_to(error, self._config, placement.key), placement)
                del delivery.placements[number:]
                return

    def _settle(self, deliveries: Sequence[Delivery]) -> None:
        """Makes the placements of each recipient durable; if one of them fails, takes that recipient's others back.

        Frees messages other than the one that was sent.
        """
        for delivery in deliveries:
            with log.context(recipient=f"<{delivery.destination.recipient.address}>"):
                for placement in delivery.placements:
                    if not delivery.failure:
                        self._sync(placement, delivery)
                if delivery.failure:
                    for placement in delivery.placements:
                        self._take_back(placement, delivery.failure)
            for placement in delivery.placements:
                if placement.placed:
                    placement.placed.close()
                if placement.message is not self._message:
                    placement.message.discard()

    def _place_one(self, placement: Placement, destination: Destination, may_move: bool) -> None:
        """Places the message unless the folder has it already. Raises StoreError, OSError and ValueError."""
        message, mailbox = placement.message, placement.mailbox
        placement.twin = self._first_in.get(placement.key) if self._config.duplicatesuppression else None
        if placement.twin or placement.key in self._claim.delivered:
            placement.event = "duplicate"
            return
        if placement.key in self._claim.busy:
            raise LmtpError(DELIVERED_ELSEWHERE)
        if self._config.lmtp_strict_quota and not destination.ignores_quota:
            mailbox.check_quota(placement.folder, message.size, 1)
        placement.placed = mailbox.place(message, placement.folder, placement.flags, may_move, placement.subscribes)
        self._first_in[placement.key] = placement

    def _sync(self, placement: Placement, delivery: Delivery) -> None:
        """Makes a placement durable; first places it anew if its twin has failed. An error becomes the failure."""
        try:
            if placement.twin and placement.twin.failure:  # another recipient's failure is not this one's
                if (first := self._first_in.get(placement.key)) and first.failure:
                    del self._first_in[placement.key]
                placement.event = "delivered"
                self._place_one(placement, delivery.destination, may_move=False)
            if placement.placed:
                placement.placed.sync()
        except Exception as error:
            delivery.fail(reply_to(error, self._config, placement.key), placement)

    def _take_back(self, placement: Placement, failure: Reply) -> None:
        if not placement.is_stored or not placement.placed:
            return
        placement.fail(failure)
        placement.placed.take_back()


class Outbox:
    """Sends what scripts want for one message, once it is stored, and records each mail as soon as it has been sent."""

    def __init__(
        self, message: Message, placer: Placer, submission: Submission, records: Records, config: Config
    ) -> None:
        self._message, self._placer, self._config = message, placer, config
        self._submission, self._records = submission, records
        self._sent: set[tuple[str, str]] = set()  # mailboxes and records: the database may be out of order
        self._fingerprint = ""

    def withhold(self, delivery: Delivery) -> None:
        """Keeps the message where a redirect would make it go round in a circle. Raises OSError."""
        mailbox = delivery.destination.mailbox
        for mail in delivery.outgoing:
            if mail.action == "redirect" and (cause := self._circle(mail, mailbox.path)):
                mail.withheld = cause
                log.warning("redirect-not-followed", cause=cause, **self._fields(mail, delivery))
                if not delivery.placements and not delivery.rejection:
                    delivery.placements.append(Placement(delivery.message, mailbox, delivery.folder))
            elif mail.withheld:
                log.info("no-answer", cause=mail.withheld, **self._fields(mail, delivery))

    def _circle(self, mail: Outgoing, mailbox: str) -> str:
        """Why a message must not be sent on; "" if it may."""
        message = self._message
        received = sum(start >= message.added for start, _ in message.header.spans(b"received"))
        if received > RECEIVED_LIMIT:
            return f"the message has {received} fields Received"
        fields = [message.header.octets[slice(*span)].lower() for span in message.header.spans(b"received")]
        own = f"by {self._config.servername} ".lower().encode()
        visits = sum(own in field and b"lmtp" in field for field in fields)
        if visits > VISITS_LIMIT:
            return f"the message has been here {visits} times: a loop"
        now, *ever = self._records_of(mail)
        is_circle = any(self._records.has(mailbox, each) for each in ever) and not self._records.has(mailbox, now)
        return "the message has been redirected already, and comes again: a loop" if is_circle else ""

    def send(self, delivery: Delivery) -> None:
        """Sends a recipient's mail. What fails is deferred or kept, if the message would else be lost."""
        mails = [mail for mail in delivery.outgoing if not mail.withheld]
        vital = [mail for mail in mails if mail.action in ("redirect", "reject")]
        failures = [failure for mail in vital if (failure := self._send(mail, delivery))]
        delivery.is_sent = len(failures) < len(vital)
        if failures and not delivery.is_stored:
            if any(failure.permanent for failure in failures):
                self._placer.keep(delivery)
            else:
                delivery.fail(SENDING_FAILED)
        if delivery.failure:
            return
        for mail in mails:
            if mail not in vital:
                self._send(mail, delivery)
        if not self._message.has_message_id or not self._message.message_id.strip("<> "):
            # It does not come again; another that is the same, such as one of a device, may.
            for mail in mails:
                if not mail.seconds and self._fingerprint:
                    self._records.add(delivery.destination.mailbox.path, dict.fromkeys(self._records_of(mail), 0))

    def _send(self, mail: Outgoing, delivery: Delivery) -> NotSent | None:
        """Sends a mail, unless it has been sent. The failure if there is one."""
        mailbox = delivery.destination.mailbox.path
        started = time.monotonic()
        try:
            records = self._records_of(mail)
            with self._records.lock(mailbox, next(iter(records), "")):
                if self._has_sent(mailbox, records):
                    if mail.action == "vacation":
                        log.info("no-answer", cause=ANSWERED_LATELY, **self._fields(mail, delivery))
                    else:
                        log.info("mail-sent-before", **self._fields(mail, delivery))
                    return None
                if mail.action == "vacation" and not self._records.is_usable():
                    raise NotSent("without the duplicate database, the sender could get the answer again and again")
                is_automatic = mail.action != "redirect"
                message = mail.compose(self._message if is_automatic else delivery.message)
                self._submission.send(message, mail.reverse_path, mail.recipients, is_automatic)
                self._sent.update((mailbox, record) for record in records)
                self._records.add(mailbox, records)
        except Exception as error:
            if not isinstance(error, (NotSent, OSError)):
                log.traceback("sending-failed")
            failure = error if isinstance(error, NotSent) else NotSent(text_of(error))
            result = "permanent" if failure.permanent else "temporary"
            log.error("mail-not-sent", result=result, cause=failure, **self._fields(mail, delivery))
            return failure
        ms = round((time.monotonic() - started) * 1000)
        log.info("mail-sent", ms=ms, **self._fields(mail, delivery))
        if mail.filing:
            self._file(message, mail.filing, delivery.destination)
        return None

    def _has_sent(self, mailbox: str, records: dict[str, int]) -> bool:
        """Whether the first of the records is there: it stands for this mail."""
        return any((mailbox, each) in self._sent or self._records.has(mailbox, each) for each in list(records)[:1])

    def _records_of(self, mail: Outgoing) -> dict[str, int]:
        """What is recorded once a mail is sent, and for how many seconds; the first stands for this very mail."""
        if mail.seconds or not mail.record:
            return {mail.record: mail.seconds} if mail.record else {}
        self._fingerprint = self._fingerprint or self._message.fingerprint()
        records = {shortened(f"{self._fingerprint} {mail.record}"): SENT_EXPIRY}
        if mail.action == "redirect" and self._message.message_id.strip("<> "):
            records[shortened(f"{self._message.message_id} {mail.record}")] = REDIRECT_EXPIRY
        return records

    def _file(self, message: Message, filing: Filing, destination: Destination) -> None:
        """Stores a copy of what has been sent. A failure is logged, and changes nothing else (RFC 8580 section 3)."""
        mailbox = destination.mailbox
        key = mailbox.key(filing.folder)
        try:
            if self._config.lmtp_strict_quota and not destination.ignores_quota:
                mailbox.check_quota(filing.folder, message.size, 1)
            placed = mailbox.place(message, filing.folder, filing.flags, subscribes=filing.is_named)
            try:
                placed.sync()
            finally:
                placed.close()
        except Exception as error:
            log.error("copy-not-filed", mailbox=key, cause=error)
        else:
            log.info("copy-filed", mailbox=key, file=placed.name)
        finally:
            message.discard()

    def _fields(self, mail: Outgoing, delivery: Delivery) -> dict[str, object]:
        """The fields of a line of the log."""
        return {
            "action": mail.action,
            "recipient": f"<{delivery.destination.recipient.address}>",
            "to": Addresses(map(str, mail.recipients)),
            "msgid": self._message.message_id,
        }


def reply_to(error: Exception, config: Config, mailbox: str = "") -> Reply:
    """The reply to an exception. Logs it, unless it is an LmtpError, or a StoreError other than MailboxFull."""
    if isinstance(error, LmtpError):
        return error.reply
    if isinstance(error, UserUnknown):
        return USER_UNKNOWN
    if isinstance(error, MailboxFull):
        log.warning("over-quota", mailbox=error.mailbox, used=error.used, limit=error.limit)
        return MAILBOX_FULL_PERMANENT if config.lmtp_over_quota_perm_failure else MAILBOX_FULL
    if isinstance(error, StoreUnavailable):
        return MAILBOX_UNUSABLE if error.permanent else STORAGE_FAILED
    if isinstance(error, OSError):
        log.error("delivery-failed", mailbox=mailbox, cause=error)
        return storage_reply(error)
    log.traceback("delivery-failed", mailbox=mailbox)
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
    is_reported = delivery.is_sent and any(mail.action == "reject" for mail in delivery.outgoing)
    is_rejected = delivery.rejection or is_reported
    if not parts or (is_rejected and not delivery.failure):
        done = "rejected" if is_rejected else "redirected" if delivery.is_sent else "discarded"
        parts.append(("not-delivered" if delivery.failure else done, path, ""))
    script = {"script": " ".join(delivery.scripts)} if delivery.scripts else {}
    for event, mailbox, file in parts:
        log.info(
            event,
            msgid=message.message_id,
            size=message.size,
            sender=f"<{envelope.reverse_path or ''}>",
            recipient=f"<{delivery.destination.recipient.address}>",
            mailbox=mailbox,
            file=file,
            **script,
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
            length = int.from_bytes(answers.read(2), "big")
            answer = answers.read(length)
        except OSError as error:
            raise Unavailable(with_path(path, error)) from None
    if not answer or len(answer) < length:
        raise Unavailable(f"{path}: no answer, or not all of it")
    if not answer.startswith((b"OK", b"NO")):
        raise Unavailable(f"{path}: neither OK nor NO")
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
            name = "".join(words[1:2]).upper()
            if words[0] == "MECH" and name and "private" not in words:
                self.mechanisms.append(name)
                if "plaintext" in words:
                    self.plaintext.append(name)

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
                    challenge = from_base64("".join(words[1:2]).encode())
                except ValueError:
                    raise Unavailable(f"{self._service.path}: a challenge that is not base64") from None
                try:
                    answer = yield challenge
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
    is_down: whether what checks passwords could not be asked which mechanisms there are.
    """

    def __init__(self, config: Config, service: str, peer: Peer, trusted: bool) -> None:
        self.trusted, self.user, self.failures, self.is_down = trusted, "", 0, False
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
            log.error("authentication-unavailable", cause=error)
            self.is_down = True
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
        except (Unavailable, ImportError, OSError) as error:  # ImportError: see setup.py, extras_require
            self._give_up(name, error)
            raise Unavailable(str(error)) from None
        except AuthenticationFailed as error:
            self.failures += 1
            log.warning("authentication-failed", mechanism=name, user=error.user, peer=self._peer.name, cause=error)
            time.sleep(self.failures)
            raise
        log.info("authenticated", user=self.user, mechanism=name, peer=self._peer.name)

    def close(self) -> None:
        """Ends what belongs to the connection."""
        if self._dovecot:
            self._dovecot.close()
            self._dovecot = None

    def _give_up(self, name: str, error: Exception) -> None:
        log.error("authentication-unavailable", mechanism=name, cause=error)
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
            log.error("authentication-unavailable", cause=cause)
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

    def fields(self, recipient: str | Addresses) -> dict[str, object]:
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
            log.traceback("internal-error")
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
            # What fails here, and for now, is not the client's fault.
            self._idle_commands += error.reply is not TOO_MANY_RECIPIENTS and error.reply.code != 451
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
        recipients = Addresses(str(each.recipient.address) for each in transaction.destinations)
        received = transaction.incoming.wire_size if transaction.incoming else 0
        log.warning("transaction-cut-off", **transaction.fields(recipients), received=received, reason=reason)

    def do_mail(self, argument: str) -> None:
        """RFC 5321 section 4.1.1.2"""
        if not self._authenticator.may_deliver:
            if self._authenticator.user:
                raise LmtpError(NOT_ALLOWED)
            is_temporary = self._config.soft_noauth or self._authenticator.is_down
            raise LmtpError(AUTHENTICATE_LATER if is_temporary else AUTHENTICATE_FIRST)
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
            self.reply(self._agent.refusal(incoming) or Reply(250, "2.0.0", f"{size} bytes received"))

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
            log.debug("connected", peer=self._peer.name)
            greeting = Reply(220, "", f"{self._config.servername}{product} ready")
            if self._config.tls_required and not self._is_protected() and not self._connection.tls_context:
                greeting = TLS_IMPOSSIBLE
            reason = self.run(greeting)
            self.log_cut_off(reason)
            self._reset()
            if self._parting is BYE or reason == END_OF_FILE:
                log.debug("disconnected", peer=self._peer.name, reason=reason)
            else:
                log.info("disconnected", peer=self._peer.name, reason=reason)

    def loggable(self, line: bytes) -> str:
        """See MailDialogue.loggable(). After a refused AUTH, a line that is no command may be a password."""
        verb = line.partition(b" ")[0].decode("utf-8", "replace").upper()
        return "..." if self._auth_refused and verb not in self.VERBS else without_secrets(line)

    def log_refusal(self, line: bytes, reply: Reply) -> None:
        """See Dialogue.log_refusal()."""
        super().log_refusal(line, reply)
        if self._agent.count:
            self._agent.count(reply, REFUSAL)
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
        # A transaction that has begun goes on to its end.
        if not self._transaction and verb.upper() not in VERBS_WHILE_SHUT:
            self._refuse_while_shut()
        method = self.VERBS.get(verb.upper())
        if not method or not verb.isascii() or not is_printable(command):
            raise LmtpError(unreadable)
        if self._config.tls_required and not self._is_protected() and verb.upper() not in VERBS_BEFORE_TLS:
            if verb.upper() == "BDAT":
                self._skip_chunk(parse_chunk_size(argument)[0])
            raise LmtpError(TLS_FIRST)
        method(self, argument)

    def _refuse_while_shut(self) -> None:
        """Raises LmtpError if the administrator has stopped all deliveries."""
        if notice := self._stop.shutdown_file.notice():
            raise LmtpError(Reply(421, "4.3.2", notice))

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
        raise LmtpError(Reply(552, "5.2.3", f"Messages may have at most {limit} bytes"))
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
# Owns the command line's meaning, and what serves a connection.
# Must not know LMTP.
# ======================================================================

QUESTIONS = ("--check", "--check-sieve", "--config", "--explain")
COUNT_LIMIT = 1_000_000  # for -U and -T; a worker waits up to 2 * -T, and epoll_wait(2) up to 2**31 ms
PR_SET_DUMPABLE, PR_SET_PTRACER, PR_SET_PTRACER_ANY = 4, 0x59616D61, -1  # prctl(2)


class UsageError(Exception):
    """The command line has an error, which the text names."""


class Arguments:
    """The command line.

    config_file: -C. uses: -U, the connections that a process serves. timeout: -T, the seconds that it waits for another
    connection; 0 for ever. debugs: -D. expects_proxy: -H. trusts_internet: -a. question: "--check" and the like; "" to
    serve. scripts: to check. address, sender: to explain. wants_all: whether to show all options.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        """options: as docopt returns them. Raises UsageError."""
        self.config_file: str = options["-C"]
        self.uses = parse_count(options["-U"], "-U")
        self.timeout: float = parse_count(options["-T"], "-T")
        self.debugs, self.expects_proxy, self.trusts_internet = options["-D"], options["-H"], options["-a"]
        self.question = next((name for name in QUESTIONS if options[name]), "")
        self.scripts: list[str] = options["<script>"]
        self.address: str = options["<address>"] or ""
        self.sender: str = options["-f"] or ""
        self.wants_all: bool = options["all"]


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

    def count_replies(self, count: Callable[[Reply, int], None]) -> None:
        """Names the function that is told each reply, see DeliveryAgent."""
        self._agent.count = count

    def serve(self, peer: Peer) -> None:
        """Serves the connection that standard input and output are: a socket, pipe, file or terminal."""
        config, arguments = self.config, self.arguments
        wire = Wire(0, 1, config.lmtp_command_timeout, config.lmtp_session_timeout, self.stop.wakeup.fd)
        connection = Connection(wire, config.lmtp_command_timeout, self._tls_context)
        if peer.internet:
            try:
                set_tcp_options(0, config)
            except OSError as error:  # no descriptor is left
                log.debug("tcp-options-not-set", cause=error)
        if arguments.expects_proxy:
            wire.set_limit(config.lmtp_auth_timeout)
            wire.on_wakeup = self._disconnect_if_stopped
            try:
                peer = read_proxy_header(connection, peer)
            except (Disconnected, LmtpError) as error:
                log.warning("connection-refused", peer=peer.name, cause=error)
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


def set_tcp_options(fd: int, config: Config) -> None:
    """Makes TCP send replies at once, and probe a silent connection if tcp_keepalive is on. Source: tcp(7).

    Raises OSError.
    """
    with Socket(fileno=os.dup(fd)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not config.tcp_keepalive:
            return
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


# ======================================================================
# Workers
#
# Owns how many processes serve connections, and what they tell each other.
# Must not know LMTP.
# ======================================================================

RELOAD_PATIENCE = 5  # seconds after SIGHUP until workers get SIGTERM; no new connection is served meanwhile
STATUS_REFRESH = 10  # seconds after which systemd is told how many connections were served
AVAILABLE, UNAVAILABLE, CONNECTED = 1, 2, 3  # messages of a worker to master(8); what our own workers note
EPOLLEXCLUSIVE = 1 << 28  # epoll_ctl(2): a connection wakes one worker, not all


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
        reporter: Reporter | PoolReporter,
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
        log.error("accept-failed", cause=error)
        time.sleep(1)  # no descriptors or no memory: no reason to leave, or to spin
        return None


class WorkerState:
    """What a worker does, in memory that it shares with its parent, so that the parent can look without a message.

    cells: a row of integers.
    """

    SIZE = 3  # cells: the last message; connections served; when the last one began or ended, in nanoseconds

    def __init__(self, cells: memoryview) -> None:
        self._cells = cells

    def begin(self) -> None:
        """Becomes the state of a new worker, which waits for a connection as soon as it has started."""
        self._cells[0], self._cells[1], self._cells[2] = AVAILABLE, 0, 0

    def note(self, message: int) -> None:
        """Notes AVAILABLE, UNAVAILABLE or CONNECTED."""
        self._cells[0] = message
        self._cells[1] += message == CONNECTED
        if message != UNAVAILABLE:
            self._cells[2] = time.monotonic_ns()

    @property
    def message(self) -> int:
        """The last message."""
        return self._cells[0]

    @property
    def served(self) -> int:
        """How many connections the worker has served, the present one included."""
        return self._cells[1]

    @property
    def since(self) -> float:
        """When its last connection has begun or ended, by time.monotonic(); 0 before the first."""
        return self._cells[2] / 1e9


class WorkerGroup:
    """The workers for some of a pool's sockets. limit: how many there may be.

    prefork: how many of them are kept idle, as far as the limit allows.
    workers: the state of each by its process id. idle: an eventfd with the count of idle workers. idle_one_left:
    whether an idle worker has left: the kernel may have woken only that one for a new connection.
    """

    def __init__(self, listeners: Sequence[Socket], limit: int, prefork: int) -> None:
        from mmap import mmap

        self.listeners, self.limit, self.prefork = listeners, limit, min(prefork, limit)
        self.workers: dict[int, WorkerState] = {}
        self.idle = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.idle_one_left = False
        size = WorkerState.SIZE
        cells = memoryview(mmap(-1, limit * size * 8)).cast("q")
        self._messages = cells[::size]
        self._unused = [WorkerState(cells[start : start + size]) for start in range(0, limit * size, size)]

    @classmethod
    def divide(cls, listeners: Sequence[Socket], handler: ConnectionHandler) -> list[WorkerGroup]:
        """The groups for these sockets: one for clients that are trusted, one for the others.

        So there is always a worker for the former, however many of the latter hold a connection.
        """
        config = handler.config
        limits = {True: config.lmtp_maxchild, False: config.lmtp_maxchild_untrusted or config.lmtp_maxchild}
        divided = {trust: [each for each in listeners if handler.trusts(each) is trust] for trust in limits}
        return [cls(divided[trust], limit, config.lmtp_prefork) for trust, limit in limits.items() if divided[trust]]

    def new_state(self) -> WorkerState:
        """The state of a worker that is about to start, and is idle then."""
        state = self._unused.pop()
        state.begin()
        os.eventfd_write(self.idle, 1)
        return state

    def free(self, state: WorkerState) -> None:
        """Takes back the state of a worker that has ended."""
        if state.message == AVAILABLE:  # it could not say that it leaves
            take_one(self.idle)
            state.note(UNAVAILABLE)
        self.idle_one_left |= state.message == UNAVAILABLE
        self._unused.append(state)

    def ready(self) -> int:
        """How many workers wait for a connection."""
        return self._messages.tolist().count(AVAILABLE)

    def is_full(self) -> bool:
        """Whether no worker may be added."""
        return len(self.workers) >= self.limit

    def needs_worker(self) -> bool:
        """Whether a connection that waits needs another worker, and may have one."""
        return (self.idle_one_left or not self.ready()) and not self.is_full()


class Pool:
    """The parent of workers on the listening sockets of systemd or inetd.

    It forks a worker when a connection waits and no worker is ready, and accepts nothing itself. A worker calls it only
    when no other one is idle. It ends on a signal, when a file has changed before a fork, or after -T idle seconds.
    """

    def __init__(self, handler: ConnectionHandler, listeners: Sequence[Socket]) -> None:
        self._handler, self._groups = handler, WorkerGroup.divide(listeners, handler)
        self._stop, self._timeout = handler.stop, handler.arguments.timeout
        self._notifier = Notifier()
        self._metrics = Metrics(handler.config.metrics_path)
        self._served = 0
        self._busy_at = time.monotonic()
        self._not_before = 0.0  # back-off: no fork until then
        self._child_left = self._outdated = False
        self._calls, self._called = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
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
            self._count_replies()
            self._reap()
        self._finish()

    def _on_child(self, *_: object) -> None:
        self._child_left = True

    def _is_over(self) -> bool:
        if self._stop.leaving:
            return True
        if self._outdated:
            log.info("files-changed")
            return True
        idle = time.monotonic() - self._busy_at
        return not self._workers() and 0 < self._timeout <= idle

    def _workers(self) -> list[int]:
        return [process for group in self._groups for process in group.workers]

    def _prefork(self) -> None:
        for group in self._groups:
            while group.ready() < group.prefork and not group.is_full() and self._may_fork() and not self._outdated:
                self._start_worker(group, preforked=True)

    def _may_fork(self) -> bool:
        return time.monotonic() >= self._not_before

    def _wait(self, patience: float) -> set[int]:
        """Waits so many seconds for something to happen; the descriptors that have become readable.

        Listening sockets are among them only if a connection that waits there needs a worker.
        """
        poll = select.poll()
        for fd in (self._stop.wakeup.fd, self._calls, self._metrics.fd):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        for group in self._groups:
            if self._may_fork() and group.needs_worker():
                group.idle_one_left = False
                for listener in group.listeners:
                    poll.register(listener, select.POLLIN)
        happened = {fd for fd, _ in poll.poll(self._patience(patience) * 1000)}
        if self._stop.wakeup.fd in happened:
            self._stop.wakeup.drain()
        if self._calls in happened:
            os.read(self._calls, READ_SIZE)
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
        state = group.new_state()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the worker handles them
        try:
            process = os.fork()
            if not process:
                self._become_worker(group, state, preforked)
            group.workers[process] = state
        except OSError as error:
            group.free(state)
            log.error("worker-not-started", cause=error)
            self._not_before = time.monotonic() + 1
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _become_worker(self, group: WorkerGroup, state: WorkerState, preforked: bool) -> NoReturn:
        status = os.EX_SOFTWARE
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent passes it on
            self._stop.unblock()
            os.close(self._calls)
            reporter = PoolReporter(self._called, state, group)
            if self._handler.config.metrics_path:
                self._handler.count_replies(self._metrics.report)
            Worker(self._handler, group.listeners, reporter, self._timeout, preforked).run()
            status = os.EX_OK
        except Exception:
            log.traceback("internal-error")
        finally:
            os._exit(status)

    def _count_replies(self) -> None:
        if self._metrics.fd >= 0:
            self._metrics.read()

    def _reap(self) -> None:
        """Forgets workers that have ended. If one died before its first connection, starts a back-off of a second."""
        if not self._child_left:
            return
        self._child_left = False
        while self._workers():
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            group = next((group for group in self._groups if process in group.workers), None)
            if not group:
                continue  # the first process of a container also gets the children of others
            state = group.workers.pop(process)
            self._served += state.served
            self._busy_at = max(self._busy_at, time.monotonic() if state.message == CONNECTED else state.since)
            if status:
                log.error("worker-died", worker=process, status=os.waitstatus_to_exitcode(status))
                if not state.served:  # it died before its first connection, and the next one will, too
                    self._not_before = time.monotonic() + 1
            group.free(state)

    def _tell_status(self) -> float:
        """Tells systemd the number of workers, and writes the metrics; the seconds after which to do it again."""
        ready = sum(group.ready() for group in self._groups)
        busy, served = len(self._workers()) - ready, self._served_by_all()
        patience = self._notifier.status(f"{ready} workers ready, {busy} busy, {served} connections served")
        if self._notifier.is_used and busy + ready:
            patience = min(patience, STATUS_REFRESH)
        return min(patience, self._metrics.write(ready, busy, served))

    def _served_by_all(self) -> int:
        return self._served + sum(state.served for group in self._groups for state in group.workers.values())

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
            self._count_replies()
            self._reap()
        self._count_replies()
        self._metrics.write(0, 0, self._served_by_all(), at_once=True)


class Reporter:
    """Tells master(8) the state of this worker, in its form: two native ints, message and process id.

    fd: the pipe to it. When it has died, the worker leaves.
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
            log.warning("parent-process-died", cause=error)
            self._stop.leaving = True


class PoolReporter:
    """Keeps the state of this worker, and calls the parent when too few workers of the group are idle.

    fd: the pipe to the parent.
    """

    def __init__(self, fd: int, state: WorkerState, group: WorkerGroup) -> None:
        self.fd = fd
        self._state, self._group = state, group
        self._others = select.poll()
        self._others.register(group.idle, select.POLLIN)

    def report(self, message: int) -> None:
        """Notes AVAILABLE, UNAVAILABLE or CONNECTED."""
        # If the worker is killed half-way, the count is too low: the parent is called once too often, never too seldom.
        if message != AVAILABLE and self._state.message == AVAILABLE:
            take_one(self._group.idle)
        self._state.note(message)
        if message == AVAILABLE:
            os.eventfd_write(self._group.idle, 1)
        elif message == CONNECTED:
            self._call_parent_if_needed()

    def _call_parent_if_needed(self) -> None:
        # The memory may show another worker's last state late. The eventfd tells for sure if this was the last one.
        if self._others.poll(0) and self._group.ready() >= self._group.prefork:
            return
        try:
            os.write(self.fd, b"\0")
        except OSError:
            return  # so many calls wait that one more tells nothing; or the parent has died, as Worker will find out


def take_one(semaphore: int) -> None:
    """Takes one from an eventfd that counts, if there is one. A process that was killed may have left a wrong count."""
    try:
        os.eventfd_read(semaphore)
    except BlockingIOError:
        return


class Notifier:
    """Tells systemd the state of the service, if systemd asks for it, see sd_notify(3).

    interval: the longest time between two calls of alive(), in seconds. is_used: whether systemd asks.
    """

    STATUS_INTERVAL = 1.0

    def __init__(self) -> None:
        self.interval = 3600.0
        self._notify: Callable[[str], object] = lambda _state: None
        self._told = ""
        self._told_at = self._alive_at = 0.0
        self._watched = False
        self.is_used = "NOTIFY_SOCKET" in os.environ
        if self.is_used:
            from systemd import daemon

            self._notify = daemon.notify
            if os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
                microseconds = int(os.environ.get("WATCHDOG_USEC", "0"))
                self._watched = microseconds > 0
                self.interval = microseconds / 2_000_000 if self._watched else self.interval

    def send(self, state: str) -> None:
        """Sends a state of sd_notify(3). If that fails, the service goes on: mail matters more."""
        try:
            self._notify(state)
        except OSError:
            return

    def alive(self) -> None:
        """Sends the watchdog's keep-alive, when it is time."""
        if self._watched and time.monotonic() >= self._alive_at + self.interval / 2:
            self._alive_at = time.monotonic()
            self.send("WATCHDOG=1")

    def status(self, text: str) -> float:
        """Sends the status, but not too often; the seconds after which to call again."""
        self.alive()
        if text == self._told:
            return self.interval
        wait = self._told_at + self.STATUS_INTERVAL - time.monotonic()
        if wait > 0:
            return wait
        self._told, self._told_at = text, time.monotonic()
        self.send(f"STATUS={text}")
        return self.interval


# ======================================================================
# Sockets
#
# Owns where connections come from: systemd, inetd, master(8), standard input.
# Must not know LMTP.
# ======================================================================

MASTER_STATUS_FD, MASTER_LISTEN_FD = 3, 4  # Cyrus master(8)


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
# Questions
#
# Owns what the program says about itself without serving. It writes no file.
# Must not know the wire.
# ======================================================================

SECRETS = ("smtp_auth_password", "sql_passwd")
CHECK_PATIENCE = 5  # seconds to connect to an address of smtp_host


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


def act_as_service(config: Config) -> None:
    """Becomes the account that delivers mail, if root asks: cyrus_user, else the owner of configdirectory.

    Where systemd starts lmtpd as its own account, cyrus_user is not set. Raises ConfigError.
    """
    user = config.cyrus_user
    if not user and os.geteuid() == 0:
        import pwd

        try:
            owner = os.stat(config.configdirectory).st_uid
            user = pwd.getpwuid(owner).pw_name if owner else ""
        except OSError as error:
            raise ConfigError(f"configdirectory: {text_of(error)}") from None
        except KeyError:
            raise ConfigError(f"configdirectory: its owner, uid {owner}, has no account: set cyrus_user") from None
    drop_privileges(user, keep=config.userdb != "maildir")


def account_name() -> str:
    """The account that this process acts as."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"


class Checkup:
    """What is wrong with a configuration and the files that it names, as lines for a person.

    errors: what keeps mail from being delivered as the configuration wants it. notes: what else should be known.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.errors: list[str] = []
        self.notes: list[str] = list(config.warnings)

    def check_tls(self) -> None:
        """Whether STARTTLS can be offered. Before root's rights are given up, if lmtpd reads the key as root."""
        config = self._config
        if config.allowstarttls and not config.tls_server_cert:
            self.errors.append("allowstarttls: tls_server_cert must be set")
        elif config.allowstarttls:
            try:
                make_tls_context(config)
            except (OSError, ValueError) as error:  # ssl.SSLError among them
                self.errors.append(f"STARTTLS is not possible: {with_path(config.tls_server_cert, error)}")
        elif config.tls_required:
            self.errors.append("tls_required: allowstarttls must be yes")

    def check(self) -> None:
        """All else, as the account that delivers mail."""
        try:
            Router(self._config)
        except ConfigError as error:
            self.errors += error.texts
        self._check_options()
        self._check_directories()
        self._check_records()
        self._check_services()
        self._check_scripts()
        self._check_sending()
        self._check_packages()

    def _check_options(self) -> None:
        for where, name in self._config.ignored:
            if is_cyrus_option(name):
                self.notes.append(f"{where}: {name}: lmtpd has no such option; Cyrus has it")
            else:
                similar = similar_option(name)
                hint = f"; perhaps {similar} is meant" if similar else ""
                self.notes.append(f"{where}: {name}: unknown option{hint}")

    def _check_directories(self) -> None:
        config = self._config
        self._check_access("configdirectory", config.configdirectory, os.R_OK | os.W_OK | os.X_OK)
        makes_mailboxes = config.userdb != "maildir" or config.autocreate_post
        self._check_access("partition", config.partition, os.R_OK | os.X_OK | (os.W_OK if makes_mailboxes else 0))
        self._check_access("shared_maildir", config.shared_maildir, os.R_OK | os.W_OK | os.X_OK)
        for name in ("duplicate_db_path", "metrics_path"):
            self._check_access(name, os.path.dirname(getattr(config, name)), os.W_OK | os.X_OK)

    def _check_access(self, name: str, path: str, mode: int) -> None:
        """Whether the path of that option, if it has one, can be read, written or searched."""
        if not path or os.access(path, mode, effective_ids=True):
            return
        try:
            os.stat(path)
            is_read_only = mode & os.W_OK and os.statvfs(path).f_flag & os.ST_RDONLY
            number = errno.EROFS if is_read_only else errno.EACCES
            error = OSError(number, os.strerror(number), path)
        except OSError as missing:
            error = missing
        self.errors.append(f"{name}: {text_of(error)}")

    def _check_records(self) -> None:
        try:
            records_of(self._config).check()
        except ConfigError as error:
            self.errors += error.texts
        except Unavailable as error:
            self.errors.append(f"duplicate_db: sql: {error}")

    def _check_services(self) -> None:
        """The user database, and what checks passwords."""
        config = self._config
        sockets = {"userdb_socket_path": config.userdb_socket_path} if config.userdb == "dovecot" else {}
        if config.admins and config.sasl_pwcheck_method == "saslauthd":
            sockets["sasl_saslauthd_path"] = config.sasl_saslauthd_path
        if config.admins and config.sasl_pwcheck_method == "dovecot":
            sockets["sasl_auth_socket_path"] = config.sasl_auth_socket_path
        for name, path in sockets.items():
            daemon = "saslauthd" if name == "sasl_saslauthd_path" else "Dovecot"
            try:
                if daemon == "Dovecot":
                    DovecotService.check(path)
                else:
                    connect_to_service(path).close()
            except Unavailable as error:
                self.errors.append(f"{name}: {error} (is {daemon} running, and may {account_name()} connect?)")
        if config.admins and config.sasl_pwcheck_method == "file":
            self._check_access("sasl_password_file", config.sasl_password_file, os.R_OK)
            if not config.sasl_password_file:
                self.errors.append("sasl_pwcheck_method: file needs sasl_password_file")
        if config.admins and config.sasl_pwcheck_method == "auxprop":
            self.errors.append("sasl_pwcheck_method: auxprop is Cyrus's own: set lmtp_sasl_pwcheck_method")

    def _check_scripts(self) -> None:
        config = self._config
        files = ScriptFiles(config, traced=False)
        for name in ("sieve_before", "sieve_default", "sieve_after"):
            path = getattr(config, name)
            try:
                for script in site_scripts(path) if path else ():
                    if not files.load(script, Identity.of_process()):
                        self.errors.append(f"{name}: {script}: {os.strerror(errno.ENOENT)}")
            except ScriptUnreadable as error:
                self.errors.append(f"{name}: {error}")
            except ScriptErrors as errors:
                places = [f"{errors.name}:{line}:{column}: {text}" for line, column, text in errors.errors]
                self.errors += [f"{name}: {place}" for place in places]
        self._check_access("sieve_global_dir", config.sieve_global_dir, os.R_OK | os.X_OK)

    def _check_sending(self) -> None:
        """Whether scripts can send mail. If not, mail is delivered all the same."""
        config = self._config
        if config.smtp_backend == "sendmail":
            if not os.access(config.sendmail, os.X_OK, effective_ids=True):
                self.notes.append(f"sendmail: {config.sendmail} cannot be run, so Sieve scripts cannot send mail")
            return
        from socket import create_connection

        host, port, _ = config.smtp_host
        try:
            create_connection((host, port), CHECK_PATIENCE).close()
        except (OSError, ValueError) as error:  # ValueError: the name breaks the rules of IDNA
            cause = getattr(error, "strerror", None) or error
            self.notes.append(f"smtp_host: {host}:{port}: {cause}, so Sieve scripts cannot send mail now")

    def _check_packages(self) -> None:
        from importlib.util import find_spec

        if self._config.sasl_pwcheck_method == "file" and self._config.admins:
            missing = [name for name in ("argon2", "scramp") if not find_spec(name)]
            texts = [f"The Python package {name} is missing: passwords for it cannot be checked" for name in missing]
            (self.errors if len(missing) > 1 else self.notes).extend(texts)
        if not find_spec("systemd"):
            self.notes.append("The Python package systemd-python is missing: systemd cannot pass sockets to lmtpd")


def check_configuration(options: Arguments, service: str) -> int:
    """Checks the configuration and the files that it names, and prints what is wrong; the exit status."""
    try:
        config = Config.load(options.config_file, service)
        config.read_only = True
        checkup = Checkup(config)
        if config.cyrus_user:
            checkup.check_tls()
        act_as_service(config)
        if not config.cyrus_user:
            checkup.check_tls()
        checkup.check()
        errors, notes = checkup.errors, checkup.notes
    except ConfigError as error:
        errors, notes = list(error.texts), []
    for text in errors:
        print(f"error: {text}")
    for text in notes:
        print(f"note: {text}")
    if not errors:
        print(f"{options.config_file} is in order for the account {account_name()}")
    return os.EX_CONFIG if errors else os.EX_OK


def show_config(config: Config, service: str, wants_all: bool) -> None:
    """Prints the options that differ from their defaults, or all, in the syntax of imapd.conf(5)."""
    for name, row in Config.table().items():
        value = config.settings.get(f"{service}_{name}") or config.settings.get(name) or row.default or ""
        if name in SECRETS and value:
            print(f"# {name} is set, and not shown")
        elif row.default is None or row.parse(value) != row.parse(row.default):
            print(f"{name}: {value}")
        elif wants_all:
            print(f"{name}: {value}" if value else f"# {name} is empty")
    ignored = {name for _, name in config.ignored}
    for name, value in config.settings.items():
        known = name in Config.table() or name.removeprefix(f"{service}_") in Config.table()
        if not known and name not in ignored:
            print(f"{name}: {value}")


def check_scripts(paths: Sequence[str], config_file: str, service: str) -> int:
    """Checks Sieve scripts, and prints each error as "file:line:column: text"; the exit status.

    config_file: the options for scripts are those of this file, or the defaults if it cannot be read.
    """
    extensions: Sequence[str] = ()
    size_limit = as_kibioctets(Config.table()["sieve_maxscriptsize"].default or "")
    if os.access(config_file, os.R_OK):
        config = Config.load(config_file, service)
        extensions, size_limit = config.sieve_extensions, config.sieve_maxscriptsize
    language = language_for(extensions)
    status = os.EX_OK
    for path in paths:
        try:
            with open(path, "rb") as stream:
                Compiler(language, size_limit).compile(stream.read(), path)
        except ScriptErrors as errors:
            status = status or os.EX_CONFIG
            for line, column, text in errors.errors:
                print(f"{path}:{line}:{column}: {text}")
        except OSError as error:
            status = os.EX_NOINPUT
            print(text_of(error), file=sys.stderr)
    return status


def explain(options: Arguments, config: Config) -> int:
    """Prints what happens to mail for an address, and does none of it; the exit status.

    If there is a message on standard input, that is what the Sieve scripts do with it, too. Raises UsageError and
    ConfigError.
    """
    address, reverse_path = address_given(options.address), address_given(options.sender)
    if not address:
        raise UsageError("--explain needs the address of a recipient")
    router = Router(config)
    with log.context(recipient=f"<{address}>"):
        try:
            destination = router.destination(address, Envelope(reverse_path), ignores_quota=False)
            folder = router.folder_of(destination)
        except (LmtpError, StoreError) as error:
            print(f"reply    {line_of(reply_to(error, config))}")
            return os.EX_OK
        explain_mailbox(destination, folder, router, config)
        octets = sys.stdin.buffer.read() if sys.stdin and not sys.stdin.isatty() else b""
        if octets:
            explain_message(Message.of(with_lf(octets, CRLF)), destination, folder, reverse_path, config)
    return os.EX_OK


def explain_mailbox(destination: Destination, folder: str, router: Router, config: Config) -> None:
    """Prints whose mailbox it is, what limits and filters it, and the reply to RCPT."""
    mailbox = destination.mailbox
    unknown = f", for {destination.recipient.userid}, who is unknown" if destination.substitute else ""
    print(f"user     {destination.substitute or destination.recipient.userid}{unknown}")
    print(f"userdb   {config.userdb}" + (f" {config.userdb_socket_path}" if config.userdb == "dovecot" else ""))
    print(f"mailbox  {mailbox.path}")
    print(f"folder   {folder_name(folder)}")
    print(f"quota    {quota_of(mailbox)}")
    print(f"script   {mailbox.script or 'none'}")
    reply = RECIPIENT_OK
    try:
        router.check_quota(destination, 0)
    except (LmtpError, StoreError) as error:
        reply = reply_to(error, config)
    print(f"reply    {line_of(reply)}")


def line_of(reply: Reply) -> str:
    """A reply as one line for a person."""
    return reply.render().decode().strip()


def quota_of(mailbox: Maildir) -> str:
    """What the mailbox has of what it may have."""
    try:
        with mailbox.identity:
            usage = mailbox.quota.usage()
    except OSError as error:
        return "none yet, for the mailbox does not exist" if error.errno == errno.ENOENT else text_of(error)
    return f"{in_words(usage.used) or 'nothing'} of {in_words(usage.limits)}" if usage else "none"


def explain_message(
    message: Message, destination: Destination, folder: str, reverse_path: Address | None, config: Config
) -> None:
    """Prints each test of the Sieve scripts, their errors, and the actions."""
    known, records = destination.recipient, records_of(config)
    kept_in = folder if config.sieve_subaddress_folder else INBOX
    occasion = Occasion(destination.mailbox, known, reverse_path, kept_in, config)
    filters = Filters(config, records if records.exists() else None, print_test)
    filtered = filters.run(message, occasion) if not known.is_shared else None
    for script, place, text in filtered.errors if filtered else ():
        print(f"error    {script}:{place}: {text}" if place else f"error    {text}")
    print(f"actions  {filtered.actions() if filtered else f'fileinto {folder_name(folder)}'}")


def print_test(script: Script, line: int, text: str) -> None:
    """Prints the result of a test."""
    print(f"test     {script.name}:{line}: {text}")


def address_given(argument: str) -> Address | None:
    """The address in an argument, with angle brackets or without; None for an empty one. Raises UsageError."""
    path = argument if argument.startswith("<") else f"<{argument}>"
    try:
        return parse_path(path)[0]
    except ValueError as error:
        raise UsageError(f"{argument!r}: {error}") from None


def answer(options: Arguments) -> int:
    """Answers the question in the command line; the exit status. No client waits, so errors are for a person."""
    log.send_to(to_stderr)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.reconfigure(errors="backslashreplace")
        status = answer_to(options)
        if sys.stdout:
            sys.stdout.flush()
        return status
    except (ConfigError, UsageError) as error:
        print(f"lmtpd: {error}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, ConfigError) else os.EX_USAGE
    except (OSError, KeyboardInterrupt) as error:
        if isinstance(error, OSError) and error.errno != errno.EPIPE:  # else the reader wants no more
            print(f"lmtpd: {text_of(error)}", file=sys.stderr)
        sys.stdout = None  # it is not to be flushed again
        return os.EX_IOERR
    except Exception:
        log.traceback("internal-error")
        return os.EX_SOFTWARE


def answer_to(options: Arguments) -> int:
    """Answers a question, see answer(). Raises ConfigError, UsageError and OSError."""
    service = os.environ.get("CYRUS_SERVICE", "lmtp")
    if options.question == "--check":
        return check_configuration(options, service)
    if options.question == "--check-sieve":
        return check_scripts(options.scripts, options.config_file, service)
    config = Config.load(options.config_file, service)
    config.read_only = True
    if options.question == "--config":
        show_config(config, service.lower(), options.wants_all)
        return os.EX_OK
    act_as_service(config)
    return explain(options, config)


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
        if options.question:
            return answer(options)
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
        log.startup_error("usage-error", cause=error)
        return refuse_to_start(os.EX_USAGE, str(error))
    except ConfigError as error:
        log.startup_error("configuration-error", cause=error)
        return refuse_to_start(os.EX_CONFIG, "Configuration error, see the log")
    except OSError as error:
        log.traceback("system-error", cause=error)
        return refuse_to_start(os.EX_OSERR, "System error, see the log")
    except Exception:
        log.traceback("internal-error")
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
    if options := plain_options(arguments):
        return Arguments(options)
    from docopt import DocoptExit, docopt

    try:
        return Arguments(docopt(__doc__, arguments, version=PRODUCT))
    except DocoptExit as error:
        raise UsageError(str(error)) from None


def plain_options(arguments: Sequence[str]) -> dict[str, Any] | None:
    """What docopt returns for SERVING_OPTIONS, each a word of its own, with the value after it; None for all else."""
    options = dict(NO_ARGUMENTS)
    words, seen = iter(arguments), set()
    for word in words:
        if word not in SERVING_OPTIONS or word in seen:
            return None
        seen.add(word)
        options[word] = next(words, "-") if SERVING_OPTIONS[word] else True
        if options[word] is not True and options[word].startswith("-"):
            return None
    return options


def log_settings(config: Config) -> None:
    """Logs what is odd about the settings: at each start of a process that listens.

    A process that serves one connection logs it only if a file has changed since it was logged last.
    """
    for text in config.warnings:
        log.warning("odd-setting", cause=text)
    if not config.ignored:
        return
    named = Stamp(f"{config.configdirectory}/options.named")
    changed = max(map(time_of_change, config.files))
    is_news = changed > named.time() or any(map(is_listening, inherited_sockets()))
    for where, name in config.ignored:
        if not is_news and not log.debugging:
            break
        if not is_cyrus_option(name):
            log.warning("unknown-option", where=where, name=name, similar=similar_option(name))
        elif changes_mail(name):
            log.info("option-without-effect", where=where, name=name)
        else:
            log.debug("option-ignored", where=where, name=name)
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


if __name__ == "__main__":
    command()
