"""Which mailbox and which folder a recipient's mail goes to, and what the IMAP servers make of it."""

from __future__ import annotations

import base64
import grp
import imaplib
import os
import pwd
import re
import stat
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from harness import AS_ROOT, STORE_USER, Client, Site
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mailboxes import connected, letter, messages_in, quoted, send
from peers import Courier, Dovecot

# What no folder can be called, or must not.
HOSTILE_DETAILS = [
    *("", "/", "//", ".", "..", "../joe", "../../joe", "a/../../joe", "a/./b", "./a", "../.Lists"),
    *(".Lists", "..Lists", "Lists/.Python", "Lists/..", "x" * 300, "x/" * 150, "é" * 120),
]
HOSTILE_OCTETS = [
    b"\0",
    b"Lists\0",
    b"a\x07b",
    b"a\x7fb",
    b"a\tb",
    b"\xff\xfe",
    b"\xc3",
    b"a\xc2\x85b",
    b"\xed\xa0\x80",
]


def stored(site: Site) -> set[Path]:
    """Every message of the site, wherever it got to."""
    return {path for part in ("new", "cur", "tmp") for path in site.root.rglob(f"{part}/*") if path.is_file()}


def folders(site: Site) -> set[Path]:
    return {path for path in site.root.rglob("*") if path.is_dir()}


def destination(site: Site, client: Client, local_part: str | bytes) -> str:
    """Delivers to the local part; the Maildir or folder that has the message, as a path below the spool."""
    before = stored(site)
    reply = send(client, quoted(local_part) if isinstance(local_part, str) else b'"%s"@example.com' % local_part)
    assert reply.startswith("250 2.1.5"), reply
    [path] = stored(site) - before
    assert path.parent.name == "new"
    return os.path.relpath(path.parent.parent, site.spool)


def modified_utf7(name: str) -> str:
    """The name of a folder as RFC 3501, 5.1.3 writes it."""
    parts = re.split(r"([^\x20-\x7e]+)", name.replace("&", "&-"))
    parts[1::2] = [
        f"&{base64.b64encode(part.encode('utf-16-be'), b'+,').decode().rstrip('=')}-" for part in parts[1::2]
    ]
    return "".join(parts)


def listed(imap: imaplib.IMAP4) -> set[str]:
    """The names of the folders that IMAP shows, as they go over the wire."""
    return names(imap.list()[1])


def subscribed(imap: imaplib.IMAP4) -> set[str]:
    return names(imap.lsub()[1])


def names(lines: Sequence[object]) -> set[str]:
    """The last word of each line of a LIST or LSUB, but for what is only the way to a folder."""
    texts = [line.decode() for line in lines if isinstance(line, bytes) and rb"\Noselect" not in line]
    return {re.sub(r'^\(.*?\) "?.*?"? ', "", text).strip('"') for text in texts}


@pytest.fixture
def lists(site: Site) -> Site:
    """jane has the folders Lists and Lists/Python, and there is joe."""
    site.add_user("jane/.Lists", "jane/.Lists.Python", "joe")
    return site


@pytest.fixture(params=[".", "/"])
def dovecot(site: Site, request: pytest.FixtureRequest) -> Iterator[Dovecot]:
    with Dovecot(site, separator=request.param) as dovecot:
        yield dovecot


# Sub-addresses


def test_a_detail_names_a_folder(lists: Site) -> None:
    client = connected(lists)
    assert destination(lists, client, "jane+Lists") == "jane/.Lists"
    assert destination(lists, client, "jane+Lists/Python") == "jane/.Lists.Python"
    assert send(client, "JANE+Lists@anywhere.example").startswith("250")
    assert len(lists.files("jane", ".Lists")) == 2


@pytest.mark.parametrize("detail", ["Nowhere", "Lists/Nowhere", "lists", "LISTS/Python", "Lists+Python", "Lists "])
def test_mail_for_a_folder_that_is_not_there_goes_to_the_inbox(lists: Site, detail: str) -> None:
    before = folders(lists)
    assert destination(lists, connected(lists), f"jane+{detail}") == "jane"
    assert folders(lists) == before


@pytest.mark.parametrize("detail", ["INBOX", "inbox", "InBoX"])
@pytest.mark.parametrize("create", ["yes", "no"])
def test_inbox_is_the_inbox_in_any_case(site: Site, detail: str, create: str) -> None:
    assert destination(site, connected(site, lmtp_detail_create=create), f"jane+{detail}") == "jane"


def test_an_unknown_user_has_no_folders_either(lists: Site) -> None:
    assert send(connected(lists, lmtp_detail_create="yes"), "nobody+Lists").startswith("550 5.1.1")


def test_a_folder_is_made_if_that_is_wanted(lists: Site) -> None:
    client = connected(lists, lmtp_detail_create="yes")
    assert destination(lists, client, "jane+New/Sub") == "jane/.New.Sub"
    assert destination(lists, client, "jane+New/Sub") == "jane/.New.Sub"
    assert destination(lists, client, "jane+Lists") == "jane/.Lists"
    folder = lists.spool / "jane/.New.Sub"
    assert sorted(path.name for path in folder.iterdir()) == ["cur", "maildirfolder", "new", "tmp"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == (pwd.getpwnam(STORE_USER).pw_uid if AS_ROOT else os.getuid())


def test_a_folder_that_has_lost_its_empty_parts_gets_them_back(lists: Site) -> None:
    """Some tools that copy a Maildir leave them out."""
    for part in ("new", "tmp"):
        (lists.spool / "jane/.Lists" / part).rmdir()
    assert destination(lists, connected(lists), "jane+Lists") == "jane/.Lists"


def test_only_its_sub_address_makes_a_folder(site: Site) -> None:
    """RCPT alone, or a message that is not stored, leaves nothing behind."""
    client = connected(site, lmtp_detail_create="yes", maxmessagesize="1000")
    client.command("MAIL FROM:<>")
    client.command("RCPT TO:<jane+New>")
    client.command("RSET")
    assert client.deliver(b"Subject: x\r\n\r\n" + b"x" * 990 + b"\r\n" + b"y\r\n" * 10, "jane+New")[0][:1] == "5"
    assert not (site.spool / "jane/.New").exists()


def test_both_servers_see_a_folder_that_was_made(site: Site, dovecot: Dovecot) -> None:
    client = connected(site, lmtp_detail_create="yes")
    assert send(client, "jane+New").startswith("250")
    assert send(client, "jane+New/Sub").startswith("250")
    imap = dovecot.login("jane")
    assert {"INBOX", "New", f"New{dovecot.separator}Sub"} == listed(imap)
    assert messages_in(imap, f"New{dovecot.separator}Sub") == 1
    imap.logout()
    imap = Courier(site).login(site.spool / "jane")
    assert {"INBOX", "INBOX.New", "INBOX.New.Sub"} == listed(imap)
    assert messages_in(imap, "INBOX.New.Sub") == 1
    imap.logout()


def test_dots_divide_the_parts_of_a_name_where_that_is_set(lists: Site) -> None:
    client = connected(lists, unixhierarchysep="no")
    assert destination(lists, client, "jane+Lists.Python") == "jane/.Lists.Python"
    assert destination(lists, client, "jane+Lists/Python") == "jane"
    client = connected(lists, unixhierarchysep="no", lmtp_detail_create="yes")
    assert destination(lists, client, "jane+New.Sub") == "jane/.New.Sub"
    assert destination(lists, client, "jane+Other/Sub") == "jane"
    assert not list((lists.spool / "jane").glob(".Other*"))


def test_a_name_with_a_dot_in_it_is_no_hierarchy_where_slashes_are(lists: Site) -> None:
    assert destination(lists, connected(lists), "jane+Lists.Python") == "jane"


def test_the_delimiter_can_be_chosen(lists: Site) -> None:
    client = connected(lists, recipient_delimiter="-")
    assert destination(lists, client, "jane-Lists") == "jane/.Lists"
    assert send(client, "jane+Lists").startswith("550 5.1.1")


def test_the_first_of_several_delimiters_counts(lists: Site) -> None:
    lists.add_user("jane/.a+b", "jane/.a-b")
    client = connected(lists, recipient_delimiter="+-")
    assert destination(lists, client, "jane-a+b") == "jane/.a+b"
    assert destination(lists, client, "jane+a-b") == "jane/.a-b"


def test_one_message_for_two_folders_of_a_user_is_no_duplicate_and_one_file(lists: Site) -> None:
    client = connected(lists, duplicatesuppression="yes")
    replies = client.deliver(letter(), "jane", "jane+Lists", "jane+Lists/Python")
    assert [reply[:3] for reply in replies] == ["250"] * 3
    files = [lists.files("jane", folder) for folder in ("", ".Lists", ".Lists.Python")]
    assert len({file.stat().st_ino for [file] in files}) == 1


@pytest.mark.parametrize("create", ["yes", "no"])
@pytest.mark.parametrize("hierarchy", ["yes", "no"])
def test_no_detail_leads_out_of_the_maildir(lists: Site, create: str, hierarchy: str) -> None:
    client = connected(lists, lmtp_detail_create=create, unixhierarchysep=hierarchy)
    before = folders(lists)
    swapped = [detail.translate(str.maketrans("/.", "./")) for detail in HOSTILE_DETAILS]
    for detail in HOSTILE_DETAILS if hierarchy == "yes" else HOSTILE_DETAILS + swapped:
        assert destination(lists, client, f"jane+{detail}") == "jane", detail
    assert folders(lists) == before


def test_a_slash_too_many_in_a_detail_is_none(lists: Site) -> None:
    client = connected(lists)
    for detail in ("/Lists", "Lists/", "//Lists/"):
        assert destination(lists, client, f"jane+{detail}") == "jane/.Lists", detail
    client = connected(lists, lmtp_detail_create="yes")
    assert destination(lists, client, "jane+/etc//passwd") == "jane/.etc.passwd"


@pytest.mark.parametrize("create", ["yes", "no"])
def test_octets_that_no_name_may_have_are_refused_or_go_to_the_inbox(lists: Site, create: str) -> None:
    client = connected(lists, lmtp_detail_create=create)
    before, messages = folders(lists), len(lists.files("jane"))
    for octets in HOSTILE_OCTETS:
        reply = send(client, b'"jane+%s"@example.com' % octets)
        messages += reply.startswith("250")
        assert reply[:1] in "25", octets
        assert len(lists.files("jane")) == messages, octets
    assert folders(lists) == before


# Names that are not ASCII


@pytest.mark.parametrize(
    ("detail", "folder"),
    [
        ("Entwürfe", ".Entw&APw-rfe"),
        ("A&B", ".A&-B"),
        ("&", ".&-"),
        ("&&ü&", ".&-&-&APw-&-"),
        ("Entw&APw-rfe", ".Entw&-APw-rfe"),
        ("~peter/mail/台北/日本語", ".~peter.mail.&U,BTFw-.&ZeVnLIqe-"),
        ("😀", ".&2D3eAA-"),
        ("重要\u3000メール", ".&kc2JgTAAMOEw,DDr-"),
        ("a😀b/ÿ", ".a&2D3eAA-b.&AP8-"),
        ('a "quoted\\" name', '.a "quoted\\" name'),
    ],
)
def test_names_are_stored_in_modified_utf_7(site: Site, detail: str, folder: str) -> None:
    client = connected(site, lmtp_detail_create="yes")
    assert destination(site, client, f"jane+{detail}") == f"jane/{folder}"
    assert destination(site, connected(site, lmtp_detail_create="no"), f"jane+{detail}") == f"jane/{folder}"


# What is a letter, a mark, a number or a sign, but neither a separator nor a wildcard of LIST.
PART = st.text(
    st.characters(
        exclude_categories=("Cc", "Cf", "Cs", "Cn", "Co", "Z"), include_characters=" ", exclude_characters="/.*%~"
    ),
    min_size=1,
    max_size=12,
).filter(lambda part: part == part.strip() and part.upper() != "INBOX" and unicodedata.is_normalized("NFC", part))
NAME = st.lists(PART, min_size=1, max_size=3).map("/".join)


def test_dovecot_sees_any_name_as_it_was_meant(site: Site) -> None:
    client = connected(site, lmtp_detail_create="yes")
    with Dovecot(site, separator="/") as dovecot:
        imap = dovecot.login("jane")

        @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(NAME)
        def check(name: str) -> None:
            encoded = modified_utf7(name)
            folder = site.spool / "jane" / f".{encoded.replace('/', '.')}"
            before = len(list((folder / "new").glob("*"))) if folder.exists() else 0
            assert send(client, quoted(f"jane+{name}")).startswith("250")
            assert len(list((folder / "new").glob("*"))) == before + 1
            escaped = encoded.replace("\\", "\\\\").replace('"', '\\"')
            assert messages_in(imap, escaped) == before + 1

        check()
        imap.logout()


# Folders with a similar name


@pytest.mark.parametrize("detail", ["my-list", "My_List", "MY LIST", "my list", "my_list"])
def test_a_similar_name_is_good_enough_where_that_is_set(site: Site, detail: str) -> None:
    site.add_user("jane/.My-List")
    assert destination(site, connected(site), f"jane+{detail}") == "jane"
    assert destination(site, connected(site, lmtp_fuzzy_mailbox_match="yes"), f"jane+{detail}") == "jane/.My-List"


@pytest.mark.parametrize("name", [".ssh", ".config"])
def test_a_directory_that_is_no_folder_is_similar_to_none(site: Site, name: str) -> None:
    (site.spool / "jane" / name).mkdir()
    client = connected(site, lmtp_fuzzy_mailbox_match="yes")
    assert destination(site, client, f"jane+{name[1:].upper()}") == "jane"
    assert list((site.spool / "jane" / name).iterdir()) == []


def test_the_same_name_is_better_than_a_similar_one(site: Site) -> None:
    site.add_user("jane/.my_list", "jane/.My-List", "jane/.MY LIST")
    client = connected(site, lmtp_fuzzy_mailbox_match="yes")
    for name in ("my_list", "My-List", "MY LIST"):
        assert destination(site, client, f"jane+{name}") == f"jane/.{name}"


def test_the_next_parent_is_good_enough_where_similar_names_are(lists: Site) -> None:
    lists.add_user("jane/.Caf&AOk-.Tisch")
    client = connected(lists, lmtp_fuzzy_mailbox_match="yes")
    assert destination(lists, client, "jane+lists/python/dev/nowhere") == "jane/.Lists.Python"
    assert destination(lists, client, "jane+LISTS/ruby/core") == "jane/.Lists"
    assert destination(lists, client, "jane+nowhere/Lists") == "jane"
    assert destination(lists, client, "jane+café/tisch/x") == "jane/.Caf&AOk-.Tisch"
    assert destination(lists, client, "jane+listsx") == "jane"


def test_similar_names_lead_out_of_no_maildir(lists: Site) -> None:
    client = connected(lists, lmtp_fuzzy_mailbox_match="yes")
    before = folders(lists)
    for detail in HOSTILE_DETAILS:
        assert destination(lists, client, f"jane+{detail}") in {"jane", "jane/.Lists", "jane/.Lists.Python"}, detail
    assert folders(lists) == before


# Folders with a special use


def test_no_mail_gets_into_the_drafts(site: Site) -> None:
    site.add_user("jane/.Entw&APw-rfe", "jane/.Mail.Later", "jane/.Drafts", "jane/.Sent")
    uses = {"xlist-drafts": "Entwürfe", "xlist-scheduled": "Mail/Later", "xlist-sent": "Sent"}
    client = connected(site, **uses)
    assert destination(site, client, "jane+Entwürfe") == "jane"
    assert destination(site, client, "jane+Mail/Later") == "jane"
    assert destination(site, client, "jane+Drafts") == "jane/.Drafts"
    assert destination(site, client, "jane+Sent") == "jane/.Sent"


def test_which_special_uses_are_refused_can_be_chosen(site: Site) -> None:
    site.add_user("jane/.Drafts", "jane/.Sent")
    uses = {"xlist-drafts": "Drafts", "xlist-sent": "Sent"}
    client = connected(site, lmtp_exclude_specialuse=r"\Sent \Archive", **uses)
    assert destination(site, client, "jane+Drafts") == "jane/.Drafts"
    assert destination(site, client, "jane+Sent") == "jane"


@pytest.mark.parametrize("option", ["lmtp_detail_create", "lmtp_fuzzy_mailbox_match"])
def test_a_special_use_is_refused_whichever_way_the_folder_is_found(site: Site, option: str) -> None:
    client = connected(site, **{"xlist-drafts": "Drafts", option: "yes"})
    assert destination(site, client, "jane+Drafts") == "jane"
    assert not (site.spool / "jane/.Drafts").exists()
    site.add_user("jane/.Drafts")
    assert destination(site, client, "jane+Drafts") == "jane"
    if option == "lmtp_fuzzy_mailbox_match":
        assert destination(site, client, "jane+drafts") == "jane"


# Shared folders


@pytest.fixture
def shared(site: Site) -> Site:
    """A Maildir for everybody, with the folders news and news/local."""
    site.add_user("../shared", "../shared/.news", "../shared/.news.local")
    site.configure(shared_maildir=str(site.root / "shared"))
    return site


def test_dovecot_shows_everybody_what_went_to_a_shared_folder(shared: Site) -> None:
    client = connected(shared)
    assert destination(shared, client, "+news") == "../shared/.news"
    assert destination(shared, client, "+news/local") == "../shared/.news.local"
    assert shared.files("jane") == []
    with Dovecot(shared, separator="/", public=shared.root / "shared") as dovecot:
        imap = dovecot.login("jane")
        assert {"Public/news", "Public/news/local"} <= listed(imap)
        assert messages_in(imap, "Public/news") == 1
        imap.select('"Public/news/local"', readonly=True)
        assert b"A body." in b"".join(
            part for item in imap.fetch("1", "(BODY.PEEK[])")[1] for part in item or () if isinstance(part, bytes)
        )
        imap.logout()


def test_shared_folders_belong_to_the_postuser(shared: Site) -> None:
    client = connected(shared, postuser="bb")
    assert destination(shared, client, "bb+news") == "../shared/.news"
    assert send(client, "+news").startswith("550 5.1.1")
    assert send(client, "bb@example.com").startswith("550 5.1.1")


@pytest.mark.parametrize("postuser", ["", "bb"])
@pytest.mark.parametrize("create", ["yes", "no"])
def test_nobody_makes_a_shared_folder_by_sending_mail(shared: Site, postuser: str, create: str) -> None:
    client = connected(shared, lmtp_detail_create=create, **({"postuser": postuser} if postuser else {}))
    before = folders(shared)
    for detail in ("nowhere", "news/nowhere", "News", *HOSTILE_DETAILS):
        reply = send(client, quoted(f"{postuser}+{detail}"))
        assert reply.startswith("550 5.1.1"), detail
    assert folders(shared) == before
    assert stored(shared) == set()


def test_without_a_place_for_shared_folders_there_are_none(site: Site) -> None:
    assert send(connected(site), "+news").startswith("550 5.1.1")


# Mail for nobody


def test_the_catch_all_gets_the_mail_of_unknown_users(lists: Site) -> None:
    client = connected(lists, lmtp_catchall_mailbox="jane")
    for address in ("nobody", "nobody+Lists", "info", "../joe"):
        assert destination(lists, client, address) == "jane", address
    assert destination(lists, client, "joe") == "joe"
    assert destination(lists, client, "jane+Lists") == "jane/.Lists"


def test_a_catch_all_that_is_not_there_catches_nothing(site: Site) -> None:
    assert send(connected(site, lmtp_catchall_mailbox="gone"), "nobody").startswith("550 5.1.1")


def test_one_message_for_two_unknown_users_is_stored_once(site: Site) -> None:
    client = connected(site, lmtp_catchall_mailbox="jane", duplicatesuppression="yes")
    replies = client.deliver(letter(), "nobody", "noone")
    assert [reply[:3] for reply in replies] == ["250", "250"]
    assert len(site.files("jane")) == 1


def test_the_postmaster_has_somewhere_to_go(site: Site) -> None:
    client = connected(site, postmaster="jane")
    for address in ("postmaster", "Postmaster@example.com", "POSTMASTER@EXAMPLE.COM", '"PostMaster"'):
        assert send(client, address).startswith("250"), address
    assert len(site.files("jane")) == 4
    site.add_user("postmaster")
    assert destination(site, client, "PostMaster") == "postmaster"


def test_the_postmaster_is_not_left_to_the_catch_all(site: Site) -> None:
    site.add_user("joe")
    client = connected(site, postmaster="joe", lmtp_catchall_mailbox="jane")
    assert destination(site, client, "Postmaster") == "joe"


# Maildirs that are made


def test_a_new_user_gets_his_folders_and_his_quota(site: Site) -> None:
    client = connected(
        site,
        autocreate_post="yes",
        autocreate_quota="100",
        autocreate_quota_messages="10",
        autocreate_inbox_folders="Sent | Lists/Ü|Spam Mail",
    )
    assert destination(site, client, "anna") == "anna"
    maildir = site.spool / "anna"
    assert {path.name for path in maildir.glob(".*")} == {".Sent", ".Lists.&ANw-", ".Spam Mail"}
    for folder in maildir.glob(".*"):
        assert sorted(path.name for path in folder.iterdir()) == ["cur", "maildirfolder", "new", "tmp"]
    head, *lines = (maildir / "maildirsize").read_text().splitlines()
    assert head == "102400S,10C"
    octets, messages = map(sum, zip(*(map(int, line.split()) for line in lines)))
    assert (octets, messages) == (site.files("anna")[0].stat().st_size, 1)


@pytest.mark.parametrize(
    ("option", "head"), [("autocreate_quota", "10240S"), ("autocreate_quota_messages", "10C"), ("umask", "")]
)
def test_a_new_user_gets_the_quota_that_is_set_and_no_other(site: Site, option: str, head: str) -> None:
    client = connected(site, autocreate_post="yes", **{option: "077" if option == "umask" else "10"})
    assert destination(site, client, "anna") == "anna"
    file = site.spool / "anna/maildirsize"
    assert (file.read_text().split("\n")[0] if file.exists() else "") == head


def test_nobody_is_made_up_unless_that_is_wanted(site: Site) -> None:
    before = folders(site)
    assert send(connected(site, autocreate_quota="100", autocreate_inbox_folders="Sent"), "anna").startswith(
        "550 5.1.1"
    )
    client = connected(site, autocreate_post="yes")
    for user in ("../anna", ".anna", "anna/x", ""):
        assert send(client, quoted(user)).startswith("55"), user
    assert folders(site) == before


def test_only_those_are_made_who_may_be(site: Site) -> None:
    client = connected(site, autocreate_post="yes", autocreate_users="anna annabel")
    assert send(client, "ANNA").startswith("250")
    assert send(client, "annabel+Lists@example.com").startswith("250")
    assert send(client, "anne").startswith("550 5.1.1")
    assert sorted(path.name for path in site.spool.iterdir()) == ["anna", "annabel", "jane"]


def test_a_group_of_users_may_be_made(site: Site) -> None:
    group = grp.getgrgid(pwd.getpwnam(STORE_USER).pw_gid).gr_name
    client = connected(site, autocreate_post="yes", autocreate_users=f"anna group:{group}")
    assert destination(site, client, STORE_USER) == STORE_USER
    assert destination(site, client, "anna") == "anna"
    for stranger in ("nobody", "daemon", "unknown", group + "x"):
        assert send(client, stranger).startswith("550 5.1.1"), stranger


def test_the_first_messages_for_a_new_user_may_come_all_at_once(site: Site) -> None:
    options = {"autocreate_inbox_folders": "Sent|Lists", "autocreate_subscribe_folders": "Sent"}
    clients = [
        connected(site, autocreate_post="yes", autocreate_quota="100", lmtp_detail_create="yes", **options)
        for _ in range(12)
    ]
    for client in clients:
        for command in ("MAIL FROM:<>", "RCPT TO:<anna>", "RCPT TO:<anna+New/Sub>", "DATA"):
            assert client.command(command)[:1] in "23"
    for client in clients:
        client.send(letter() + b".\r\n")
    for client in clients:
        assert [client.reply()[-1][:3] for _ in range(2)] == ["250", "250"]
    assert len(site.files("anna")) == len(site.files("anna", ".New.Sub")) == 12
    lines = (site.spool / "anna/maildirsize").read_text().splitlines()[1:]
    assert sum(int(line.split()[1]) for line in lines) == 24
    assert (site.spool / "anna/subscriptions").read_text().split() == ["V", "2", "Sent"]


def test_a_new_user_is_subscribed_to_his_folders(site: Site, dovecot: Dovecot) -> None:
    """Those that are subscribed and not made are of no use to anybody."""
    client = connected(
        site,
        autocreate_post="yes",
        autocreate_inbox_folders="Sent|Lists/Ü|Spam|R&D",
        autocreate_subscribe_folders="Sent|Lists/Ü|R&D",
    )
    assert destination(site, client, "anna") == "anna"
    imap = dovecot.login("anna")
    assert subscribed(imap) == {"Sent", f"Lists{dovecot.separator}&ANw-", "R&-D"}
    imap.subscribe("Spam")
    assert "Spam" in subscribed(imap)
    imap.logout()


def test_a_new_user_of_courier_is_subscribed_to_his_folders(site: Site) -> None:
    client = connected(
        site,
        autocreate_post="yes",
        autocreate_inbox_folders="Sent|Lists/Python|Spam",
        autocreate_subscribe_folders="Sent|Lists/Python",
    )
    assert destination(site, client, "anna") == "anna"
    imap = Courier(site).login(site.spool / "anna")
    assert subscribed(imap) - {"INBOX"} == {"INBOX.Sent", "INBOX.Lists.Python"}
    imap.subscribe("INBOX.Spam")
    assert {"INBOX.Sent", "INBOX.Spam"} <= subscribed(imap)
    imap.logout()


# A client that waits


def await_message(imap: imaplib.IMAP4) -> float:
    """Reads until the server tells of a message; the time it does."""
    imap.socket().settimeout(20)  # Dovecot looks for itself after 30 seconds
    while not re.match(rb"\* \d+ EXISTS", imap.readline()):
        pass
    return time.monotonic()


@pytest.mark.parametrize(("address", "folder"), [("jane", "INBOX"), ("jane+Lists", "Lists")])
def test_a_client_in_idle_sees_the_message_within_a_second(lists: Site, address: str, folder: str) -> None:
    client = connected(lists)
    with Dovecot(lists) as dovecot:
        imap = dovecot.login("jane")
        assert imap.select(folder) == ("OK", [b"0"])
        waits = []
        for _ in range(3):
            imap.send(b"x IDLE\r\n")
            assert imap.readline().startswith(b"+")
            began = time.monotonic()
            assert send(client, address).startswith("250")
            waits.append(await_message(imap) - began)
            imap.send(b"DONE\r\n")
            while not imap.readline().startswith(b"x OK"):
                pass
        imap.logout()
    assert min(waits) < 1  # unless the machine has no time for them


# What must not keep mail out


def test_a_name_too_long_for_the_disk_in_one_spelling_leads_to_the_inbox(lists: Site) -> None:
    assert destination(lists, connected(lists), "jane+" + "字" * 90) == "jane"


def test_a_new_user_may_have_a_sub_address_where_folders_are_compared(site: Site) -> None:
    client = connected(
        site, autocreate_post="yes", lmtp_fuzzy_mailbox_match="yes", quota_exclude_folders="Trash", default_quota="1M"
    )
    assert destination(site, client, "newcomer+lists") == "newcomer"


def test_a_path_may_end_in_a_slash(site: Site) -> None:
    assert destination(site, connected(site, maildir_path="%p/%u/", autocreate_post="yes"), "newcomer") == "newcomer"


def test_a_per_cent_sign_before_a_letter_does_not_stand_for_it(site: Site) -> None:
    assert (
        destination(site, connected(site, maildir_path="%p/%%d/%n", autocreate_post="yes"), "newcomer") == "%d/newcomer"
    )


def test_the_inbox_may_be_among_the_folders_of_a_new_user(site: Site) -> None:
    options = {"autocreate_inbox_folders": "INBOX|Sent", "autocreate_subscribe_folders": "INBOX|Sent"}
    assert destination(site, connected(site, autocreate_post="yes", **options), "newcomer") == "newcomer"
    assert (site.spool / "newcomer/subscriptions").read_text() == "V\t2\n\nINBOX\nSent\n"


def test_a_folder_may_have_several_special_uses(lists: Site) -> None:
    client = connected(lists, **{"xlist-drafts": "Lists", "xlist-archive": "Lists"})
    assert destination(lists, client, "jane+Lists") == "jane"


def test_the_postuser_is_the_same_in_any_case(shared: Site) -> None:
    assert send(connected(shared, postuser="BB"), "Bb+news@example.com").startswith("250 2.1.5")


def test_mail_for_shared_folders_waits_while_their_place_is_missing(shared: Site) -> None:
    client = connected(shared, shared_maildir=str(shared.root / "not-mounted"))
    assert send(client, "+news@example.com").startswith("451 4.3.0")


def test_a_deputy_who_is_nobody_is_logged(site: Site) -> None:
    assert send(connected(site, lmtp_catchall_mailbox="nobody"), "unknown@example.com").startswith("550 5.1.1")
    assert "fallback-user-unknown session=" in site.log_text()
