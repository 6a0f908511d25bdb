"""What a script remembers: variables, flags, included scripts, duplicates; and what it asks about itself."""

from __future__ import annotations

from sieve_cases import Case, does, letter, require

NUMERIC = ("relational", "comparator-i;ascii-numeric")


def variable(name: str, commands: str, *capabilities: str, message: bytes = letter("Subject: abcd")) -> Case:
    """Commands that leave a result in ${r}, which becomes the name of a folder."""
    return does(name, f'{commands} fileinto "={{${{r}}}}";', "fileinto", "variables", *capabilities, message=message)


VARIABLES = [
    variable("set", 'set "r" "value";'),
    variable("set-again", 'set "r" "a"; set "r" "b";'),
    variable("set-from-itself", 'set "r" "a"; set "r" "${r}${r}b";'),
    variable("name-case", 'set "Some_Name1" "x"; set "r" "${sOME_nAME1}";'),
    variable("name-underscore-first", 'set "_a" "x"; set "r" "${_A}";'),
    variable("set-to-itself", 'set "r" "a"; set "r" "${r}";'),
    variable("unknown-is-empty", 'set "r" "a${nothing}b";'),
    variable("not-a-reference", 'set "a" "x"; set "r" "${ a }${a";'),
    variable("dollar-before", 'set "a" "x"; set "r" "$${a}";'),
    variable("reference-in-a-reference", 'set "a" "x"; set "x" "y"; set "r" "${${a}}";'),
    variable("no-second-expansion", 'set "dollar" "$"; set "a" "x"; set "r" "${dollar}{a}";'),
    variable("escaped-dollar", 'set "a" "x"; set "r" "\\${a}";'),
    variable("name-not-allowed", 'set "r" "${a-b}${1a}${}";'),
    variable("leading-zeros", 'if header :matches "subject" "*b*" { set "r" "${01}${002}"; }'),
    variable(
        "in-multi-line", 'set "a" "x"; set "r" text:\n${a}y\n.\n; if string :matches "${r}" "xy??" { set "r" "ok"; }'
    ),
    variable("in-a-list", 'set "a" "abcd"; if header :is "subject" ["x", "${a}"] { set "r" "yes"; }'),
    variable("not-in-a-comment", 'set "a" "x"; # ${a\nset "r" "${a}";'),
    variable("lower", 'set :lower "r" "ABCdeÄ";'),
    variable("upper", 'set :upper "r" "abcDEä";'),
    variable("lowerfirst", 'set :lowerfirst "r" "ABC";'),
    variable("upperfirst", 'set :upperfirst "r" "abc";'),
    variable("lower-upperfirst", 'set :lower :upperfirst "r" "aBC";'),
    variable("upperfirst-lower", 'set :upperfirst :lower "r" "aBC";'),
    variable("upper-lowerfirst", 'set :upper :lowerfirst "r" "aBC";'),
    variable("quotewildcard", 'set :quotewildcard "r" "a*b?c\\\\d";'),
    variable("quotewildcard-length", 'set :length :quotewildcard "r" "a*b?";'),
    variable("quotewildcard-upper", 'set :quotewildcard :upper "r" "a*";'),
    variable("length", 'set :length "r" "abc";'),
    variable("length-of-nothing", 'set :length "r" "";'),
    variable("length-of-characters", 'set :length "r" "äö€😀";'),
    variable("length-of-blanks", 'set :length "r" " a ";'),
    variable("all-modifiers", 'set :length :quotewildcard :upper :lowerfirst "r" "a*b";'),
    variable("modifier-of-a-variable", 'set "a" "abc"; set :upper "r" "${a}";'),
    variable("first-of-a-digit", 'set :upperfirst "r" "1abc";'),
    variable("quoted-is-matched", 'set :quotewildcard "p" "a*b"; if string :matches "a*b" "${p}" { set "r" "yes"; }'),
    variable(
        "quoted-is-not-a-wildcard", 'set :quotewildcard "p" "a*b"; if string :matches "axb" "${p}" { set "r" "no"; }'
    ),
    variable("match-0", 'if header :matches "subject" "a?*" { set "r" "${0}"; }'),
    variable("match-all", 'if header :matches "subject" "a?*" { set "r" "${1}|${2}|${3}"; }'),
    variable("match-is-shortest", 'if header :matches "x" "*-*" { set "r" "${1}|${2}"; }', message=letter("X: a-b-c")),
    variable(
        "match-three-stars",
        'if header :matches "x" "*-*-*" { set "r" "${1}|${2}|${3}"; }',
        message=letter("X: a-b-c-d"),
    ),
    variable("match-star-star", 'if header :matches "x" "**" { set "r" "${1}|${2}"; }', message=letter("X: abc")),
    variable("match-empty-star", 'if header :matches "x" "a*bc" { set "r" "${1}|"; }', message=letter("X: abc")),
    variable("match-end", 'if header :matches "x" "*ab" { set "r" "${1}"; }', message=letter("X: ababab")),
    variable(
        "match-mark-and-star", 'if header :matches "x" "?*?" { set "r" "${1}|${2}|${3}"; }', message=letter("X: abcd")
    ),
    variable(
        "match-star-mark-star", 'if header :matches "x" "*?*" { set "r" "${1}|${2}|${3}"; }', message=letter("X: abcd")
    ),
    variable("match-keeps-case", 'if header :matches "x" "a*" { set "r" "${0}|${1}"; }', message=letter("X: AbC")),
    variable(
        "match-decoded", 'if header :matches "x" "g*n" { set "r" "${1}"; }', message=letter("X: =?utf-8?q?gr=C3=BCn?=")
    ),
    variable("match-escaped-star", 'if header :matches "x" "a\\\\**" { set "r" "${1}"; }', message=letter("X: a*b*c")),
    variable(
        "match-not-changed-by-failure",
        'if header :matches "subject" "a*" {} if header :matches "subject" "x*" {} set "r" "${1}";',
    ),
    variable(
        "match-not-changed-by-is",
        'if header :matches "subject" "a*" {} if header :is "subject" "abcd" {} set "r" "${1}";',
    ),
    variable(
        "match-changed-by-success",
        'if header :matches "subject" "a*" {} if header :matches "subject" "*d" {} set "r" "${1}|${2}";',
    ),
    variable(
        "match-fewer-values",
        'if header :matches "subject" "?b?d" {} if header :matches "subject" "*" {} set "r" "${1}|${2}";',
    ),
    variable("match-in-not", 'if not header :matches "subject" "a*" {} set "r" "${1}";'),
    variable(
        "match-in-anyof",
        'if anyof (header :matches "x" "*", header :matches "subject" "ab*", exists "subject") { set "r" "${1}"; }',
    ),
    variable(
        "match-in-allof",
        'if allof (header :matches "subject" "a*", header :matches "subject" "ab*") { set "r" "${1}"; }',
    ),
    variable("match-in-failed-allof", 'if allof (header :matches "subject" "a*", exists "x-none") {} set "r" "${1}";'),
    variable("match-first-of-the-keys", 'if header :matches "subject" ["x*", "ab*", "a*"] { set "r" "${1}"; }'),
    variable(
        "match-first-of-the-fields",
        'if header :matches ["x", "y"] "*" { set "r" "${1}"; }',
        message=letter("Y: b", "X: a"),
    ),
    variable(
        "match-address",
        'if address :localpart :matches "from" "*.*" { set "r" "${1}|${2}"; }',
        message=letter("From: a.b@c.d"),
    ),
    variable("match-envelope", 'if envelope :domain :matches "from" "*.org" { set "r" "${1}"; }', "envelope"),
    variable(
        "match-31",
        'if header :matches "x" "' + "?" * 31 + '*" { set "r" "${1}${9}${10}${31}"; }',
        message=letter("X: 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGH"),
    ),
    variable("match-set-before", 'set "a" "${1}"; if header :matches "subject" "a*" { set "r" "${a}|${1}"; }'),
    variable(
        "match-itself", 'if header :matches "subject" "a*" { if string :matches "${1}" "b*" { set "r" "${1}"; } }'
    ),
    variable(
        "match-not-by-body", 'if header :matches "subject" "a*" {} if body :matches "B*" {} set "r" "${1}";', "body"
    ),
    variable("string-is", 'set "a" "x"; if string :is :comparator "i;octet" "${a}" "x" { set "r" "yes"; }'),
    variable("string-casemap", 'if string :is :comparator "i;ascii-casemap" "ABC" "abc" { set "r" "yes"; }'),
    variable("string-default-comparator", 'if string "ABC" "abc" { set "r" "casemap"; }'),
    variable(
        "string-numeric-nothing", 'if string :is :comparator "i;ascii-numeric" "" "x" { set "r" "yes"; }', *NUMERIC
    ),
    variable("string-lists", 'if string :is ["a", "b"] ["c", "b"] { set "r" "yes"; }'),
    variable("string-empty", 'if string "${nothing}" "" { set "r" "yes"; }'),
    variable("string-contains-nothing", 'if string :contains "" "" { set "r" "yes"; }'),
    variable(
        "string-count",
        'if string :count "eq" :comparator "i;ascii-numeric" ["a", "", "b"] "2" { set "r" "yes"; }',
        *NUMERIC,
    ),
    variable(
        "string-count-none",
        'if string :count "eq" :comparator "i;ascii-numeric" "${nothing}" "0" { set "r" "yes"; }',
        *NUMERIC,
    ),
    variable(
        "string-value", 'if string :value "gt" :comparator "i;ascii-numeric" "10" "9" { set "r" "yes"; }', *NUMERIC
    ),
    variable("long-value", f'set "a" "{"x" * 1000}"; set "a" "${{a}}${{a}}"; set :length "r" "${{a}}${{a}}";'),
    variable("values-of-4000", f'set "a" "{"x" * 4000}"; set :length "r" "${{a}}";'),
    variable("64-letters", f'set "{"a" * 64}" "x"; set "r" "${{{"A" * 64}}}";'),
    variable("100-variables", "".join(f'set "v{n}" "{n}";' for n in range(100)) + 'set "r" "${v0}-${v50}-${v99}";'),
    variable("global-of-its-own", 'global "r"; set "r" "x";', "include"),
    variable("global-namespace", 'set "global.a" "x"; set "r" "${global.a}";', "include"),
    variable("global-both-ways", 'global "a"; set "a" "x"; set "r" "${global.a}";', "include"),
    variable("global-name-case", 'global "Abc"; set "aBC" "x"; set "r" "${abc}";', "include"),
]


def flags(name: str, commands: str, *capabilities: str) -> Case:
    return does(name, commands, "imap4flags", "fileinto", *capabilities)


FLAGS = [
    flags("setflag", 'setflag "\\\\Seen";'),
    flags("setflag-all", 'setflag ["\\\\Seen", "\\\\Answered", "\\\\Flagged", "\\\\Deleted", "\\\\Draft"];'),
    flags("setflag-keywords", 'setflag ["$Label1", "NonJunk", "a.b:c/d"];'),
    flags("setflag-words", 'setflag "a b  c ";'),
    flags("setflag-nothing", 'setflag "a"; setflag "";'),
    flags("setflag-again", 'setflag "a"; setflag "b";'),
    flags("setflag-case", 'setflag ["\\\\sEEN", "\\\\Seen", "abc", "ABC"];'),
    flags("setflag-unknown-system-flag", 'setflag ["\\\\Unknown", "a"];'),
    flags("setflag-recent", 'setflag ["\\\\Recent", "a"];'),
    flags("setflag-invalid-keyword", 'setflag ["a(b", "c"];'),
    flags("setflag-umlaut", 'setflag ["ü", "c"];'),
    flags("setflag-glued", 'setflag "\\\\Seen\\\\Flagged";'),
    flags("addflag", 'setflag "a"; addflag "b"; addflag ["c d", "A"];'),
    flags("addflag-alone", 'addflag "a";'),
    flags("removeflag", 'setflag ["a", "b", "c"]; removeflag "B";'),
    flags("removeflag-several", 'setflag ["a", "b", "c"]; removeflag ["a", "c x"];'),
    flags("removeflag-words", 'setflag ["a", "b", "c"]; removeflag "a c";'),
    flags("removeflag-all", 'setflag ["a", "\\\\Seen"]; removeflag ["\\\\seen", "a"];'),
    flags("removeflag-none", 'removeflag "a";'),
    flags("flags-of-keep", 'keep :flags ["a", "\\\\Seen"];'),
    flags("flags-of-fileinto", 'fileinto :flags "a b" "x";'),
    flags("flags-repeated", 'keep :flags ["a", "A", "b"];'),
    flags("flags-replace", 'setflag "a"; keep :flags "b";'),
    flags("flags-of-nothing", 'setflag "a"; keep :flags "";'),
    flags("flags-leave-the-variable", 'setflag "a"; fileinto :flags "b" "x"; fileinto "y";'),
    flags("flags-of-the-moment", 'setflag "a"; fileinto "x"; setflag "b"; fileinto "y"; keep;'),
    flags("flags-after-the-action", 'keep; setflag "a";'),
    flags("flags-of-the-implicit-keep", 'setflag "a"; if true { addflag "b"; }'),
    flags("flags-of-two-filings", 'fileinto :flags "a" "x"; fileinto :flags "b" "x";'),
    flags("flags-then-none", 'fileinto :flags "a" "x"; fileinto "x";'),
    flags("flags-of-two-keeps", 'keep; keep :flags "a";'),
    flags("flags-of-keep-and-inbox", 'keep :flags "a"; fileinto :flags "b" "INBOX";'),
    flags("flags-of-inbox-and-keep", 'fileinto :flags "b" "INBOX"; keep :flags "a";'),
    flags("flags-copy", 'fileinto :copy :flags "a" "x";', "copy"),
    flags("flags-copy-other-order", 'fileinto :flags "a" :copy "x";', "copy"),
    flags("flags-create", 'fileinto :create :flags "a" "x";', "mailbox"),
    flags("hasflag", 'setflag "a b"; if hasflag "b" { fileinto "yes"; }'),
    flags("hasflag-not", 'setflag "a b"; if hasflag "c" { fileinto "yes"; }'),
    flags("hasflag-case", 'setflag "\\\\Seen"; if hasflag "\\\\SEEN" { fileinto "yes"; }'),
    flags("hasflag-words", 'setflag "a"; if hasflag "b a" { fileinto "yes"; }'),
    flags("hasflag-contains", 'setflag "abc"; if hasflag :contains "b" { fileinto "yes"; }'),
    flags("hasflag-matches", 'setflag "abc xyz"; if hasflag :matches "x*" { fileinto "yes"; }'),
    flags("hasflag-matches-one-at-a-time", 'setflag "abc xyz"; if hasflag :matches "a*z" { fileinto "yes"; }'),
    flags(
        "hasflag-count",
        'setflag ["a b", "A"]; if hasflag :count "eq" :comparator "i;ascii-numeric" "2" { fileinto "yes"; }',
        *NUMERIC,
    ),
    flags(
        "hasflag-count-none",
        'setflag ""; if hasflag :count "eq" :comparator "i;ascii-numeric" "0" { fileinto "yes"; }',
        *NUMERIC,
    ),
    flags("hasflag-octet", 'setflag "abc"; if hasflag :comparator "i;octet" "ABC" { fileinto "yes"; }'),
    flags("hasflag-nothing-set", 'if hasflag :contains "" { fileinto "yes"; }'),
    flags("hasflag-empty", 'setflag "a"; if hasflag "" { fileinto "yes"; }'),
    flags("hasflag-empty-contained", 'setflag "a"; if hasflag :contains "" { fileinto "yes"; }'),
    flags("variable-of-flags", 'setflag "v" "a b"; fileinto "=${v}=";', "variables"),
    flags("variable-is-added-to", 'setflag "v" "a"; addflag "v" ["b", "A"]; fileinto "=${v}=";', "variables"),
    flags("variable-is-removed-from", 'setflag "v" "a b c"; removeflag "v" "b"; fileinto "=${v}=";', "variables"),
    flags("variable-is-tested", 'setflag "v" "a b"; if hasflag "v" "b" { fileinto "yes"; }', "variables"),
    flags(
        "variables-are-tested",
        'setflag "v" "a"; setflag "w" "b"; if hasflag ["v", "w"] ["x", "b"] { fileinto "yes"; }',
        "variables",
    ),
    flags("variable-is-not-the-internal-one", 'setflag "v" "a"; keep;', "variables"),
    flags("variable-as-flags", 'setflag "v" ["a b", "c"]; keep :flags "${v}";', "variables"),
    flags("variable-in-a-flag", 'set "v" "x"; setflag "a${v}b";', "variables"),
    flags("variable-of-many-flags", 'set "v" "a b"; addflag "${v}";', "variables"),
    flags(
        "flags-and-copies", 'setflag "a"; fileinto :copy "x"; addflag "b"; fileinto :copy "y"; removeflag "a";', "copy"
    ),
    flags("hasflag-after-action", 'setflag "a"; keep; if hasflag "a" { fileinto "x"; }'),
]


def included(name: str, commands: str, **others: str) -> Case:
    """A script that includes others, all of which require the same."""
    capabilities = ("include", "fileinto", "copy", "variables", "imap4flags", "editheader", "relational")
    first = require(*capabilities)
    return Case(name, first + commands, others={other: first + text for other, text in others.items()})


INCLUDES = [
    included("include", 'include "a";', a='fileinto "a";'),
    included("include-personal", 'include :personal "a";', a='fileinto "a";'),
    included("include-between", 'fileinto "x"; include "a"; fileinto "y";', a='fileinto "a";'),
    included("include-stop", 'include "a"; fileinto "y";', a='fileinto "a"; stop;'),
    included("include-return", 'include "a"; fileinto "y";', a='fileinto "a"; return; fileinto "b";'),
    included("include-return-in-a-block", 'include "a"; fileinto "y";', a='if true { return; } fileinto "b";'),
    included("return-at-the-top", 'fileinto "x"; return; fileinto "y";'),
    included("return-alone", 'return; fileinto "y";'),
    included("include-missing", 'fileinto "x"; include "none";'),
    included("include-missing-in-a-branch", 'fileinto "x"; if header "subject" "none" { include "none"; }'),
    included("include-optional-missing", 'fileinto "x"; include :optional "none";'),
    included("include-optional-there", 'include :optional "a";', a='fileinto "a";'),
    included("include-error", 'fileinto "x"; include "a";', a="bogus;"),
    included("include-optional-error", 'fileinto "x"; include :optional "a";', a="bogus;"),
    included("include-run-time-error", 'fileinto "x"; include "a";', a='fileinto "y"; fileinto "a//b";'),
    included(
        "include-twice", 'global "n"; include "a"; include "a"; fileinto "n${n}";', a='global "n"; set "n" "${n}x";'
    ),
    included(
        "include-once",
        'global "n"; include :once "a"; include :once "a"; fileinto "n${n}";',
        a='global "n"; set "n" "${n}x";',
    ),
    included(
        "include-once-after",
        'global "n"; include "a"; include :once "a"; fileinto "n${n}";',
        a='global "n"; set "n" "${n}x";',
    ),
    included(
        "include-once-before",
        'global "n"; include :once "a"; include "a"; fileinto "n${n}";',
        a='global "n"; set "n" "${n}x";',
    ),
    included("include-itself", 'fileinto "x"; include "active";'),
    included("include-in-a-circle", 'include "a";', a='include "b";', b='fileinto "b"; include "a";'),
    included("include-chain", 'include "a"; fileinto "x";', a='include "b"; fileinto "a";', b='fileinto "b";'),
    included(
        "include-10-deep",
        'include "d1";',
        **{f"d{n}": f'include "d{n + 1}";' for n in range(1, 10)},
        d10='fileinto "deep";',
    ),
    included(
        "include-11-deep",
        'include "d1";',
        **{f"d{n}": f'include "d{n + 1}";' for n in range(1, 11)},
        d11='fileinto "deep";',
    ),
    included(
        "include-global-variable",
        'global "v"; set "v" "1"; include "a"; fileinto "r${v}";',
        a='global "v"; set "v" "${v}2";',
    ),
    included(
        "include-global-variables",
        'global ["v", "w"]; set "v" "1"; set "w" "2"; include "a"; fileinto "r${v}";',
        a='global ["w", "v"]; set "v" "${v}${w}";',
    ),
    included("include-local-variable", 'set "v" "1"; include "a"; fileinto "r${v}";', a='set "v" "2";'),
    included("include-global-here-only", 'global "v"; set "v" "1"; include "a"; fileinto "r${v}";', a='set "v" "2";'),
    included(
        "include-namespace",
        'set "global.v" "1"; include "a"; fileinto "r${global.v}";',
        a='set "global.v" "${global.v}2";',
    ),
    included("include-matches-not-inside", 'if header :matches "subject" "*" { include "a"; }', a='fileinto "i${1}";'),
    included(
        "include-matches-not-outside",
        'include "a"; fileinto "o${1}";',
        a='if header :matches "subject" "*" { fileinto :copy "i"; }',
    ),
    included("include-flags", 'setflag "f"; include "a";', a='addflag "g"; keep;'),
    included("include-discard", 'include "a";', a="discard;"),
    included("include-nothing", 'include "a";', a=""),
    included("include-editheader", 'include "a"; if exists "x-new" { fileinto "y"; }', a='addheader "X-New" "v";'),
    included("include-name-with-a-blank", 'include "a b";', **{"a b": 'fileinto "a";'}),
    included("include-name-of-umlauts", 'include "ä";', ä='fileinto "a";'),
    included("include-name-with-a-slash", 'fileinto "x"; include "b/a";', a='fileinto "a";'),
    included("include-name-up", 'fileinto "x"; include "../a";', a='fileinto "a";'),
    included("include-name-with-suffix", 'fileinto "x"; include "a.sieve";', a='fileinto "a";'),
    included("include-name-from-a-variable", 'set "n" "a"; fileinto "x"; include "${n}";', a='fileinto "a";'),
    included("include-global-missing", 'fileinto "x"; include :global "none";'),
    Case("include-requires-for-itself", 'require ["include", "fileinto"]; include "a";', others={"a": 'fileinto "x";'}),
    Case(
        "include-requires-alone", 'require "include"; include "a";', others={"a": 'require "fileinto"; fileinto "x";'}
    ),
]

IHAVE = [
    does("ihave", 'if ihave "fileinto" { fileinto "a"; } else { discard; }', "ihave"),
    does("ihave-not", 'if ihave "vnd.example.nothing" { bogus; } else { keep; }', "ihave"),
    does("ihave-several", 'if ihave ["fileinto", "copy"] { fileinto :copy "a"; }', "ihave"),
    does("ihave-not-all", 'if ihave ["fileinto", "vnd.example.nothing"] { fileinto "a"; } else { discard; }', "ihave"),
    does("ihave-base", 'if ihave "comparator-i;ascii-casemap" { discard; }', "ihave"),
    does("ihave-not-required", 'if ihave "fileinto" { fileinto "a"; }'),
    does(
        "ihave-and-elsif",
        'if ihave "vnd.example.nothing" { nothing "x"; } elsif ihave "fileinto" { fileinto "b"; }',
        "ihave",
    ),
    does("ihave-unknown-test", 'if allof (ihave "vnd.example.nothing", nothing :tag "x") { discard; }', "ihave"),
    does("ihave-not-negated", 'if not ihave "vnd.example.nothing" { fileinto "n"; }', "ihave", "fileinto"),
    does("error", 'fileinto "a"; error "It is so."; fileinto "b";', "ihave", "fileinto"),
    does("error-in-a-branch", 'fileinto "a"; if header "subject" "none" { error "It is so."; }', "ihave", "fileinto"),
    does("error-in-else", 'if ihave "fileinto" { fileinto "a"; } else { error "No fileinto."; }', "ihave"),
]


def twice(name: str, commands: str, message: bytes = letter("Message-ID: <a@b>", "X-U: u"), times: int = 2) -> Case:
    return Case(name, require("duplicate", "fileinto", "imap4flags") + commands, message, times=times)


DUPLICATES = [
    twice("duplicate", 'if duplicate { fileinto "again"; }'),
    twice("duplicate-three-times", 'if duplicate { fileinto "again"; }', times=3),
    twice("duplicate-discard", "if duplicate { discard; }"),
    twice("duplicate-of-a-discarded", 'if duplicate { fileinto "again"; } else { discard; }'),
    twice("duplicate-not", 'if not duplicate { fileinto "first"; }'),
    twice("duplicate-no-message-id", 'if duplicate { fileinto "again"; }', letter("Subject: s")),
    twice("duplicate-header", 'if duplicate :header "X-U" { fileinto "again"; }'),
    twice("duplicate-header-missing", 'if duplicate :header "X-None" { fileinto "again"; }'),
    twice("duplicate-uniqueid", 'if duplicate :uniqueid "k" { fileinto "again"; }', letter("Subject: s")),
    twice("duplicate-handle", 'if duplicate :handle "h" { fileinto "again"; }'),
    twice("duplicate-seconds", 'if duplicate :seconds 100 { fileinto "again"; }'),
    twice("duplicate-last", 'if duplicate :seconds 100 :last { fileinto "again"; }'),
    twice(
        "duplicate-handles-differ",
        'if duplicate :handle "a" { fileinto "a"; } if duplicate :handle "b" { fileinto "b"; }',
    ),
    twice("duplicate-not-reached", 'if header "x-u" "none" { if duplicate { fileinto "again"; } }'),
    twice("duplicate-after-an-error", 'if duplicate { fileinto "again"; } fileinto "a//b";'),
]

CASES = [*VARIABLES, *FLAGS, *INCLUDES, *IHAVE, *DUPLICATES]
