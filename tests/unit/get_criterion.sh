# Brings Criterion, the library the C tests are written with, or says what to install.
as_root=
[ "$(id -u)" = 0 ] || as_root='sudo -n'
if command -v apt-get > /dev/null && $as_root true 2> /dev/null; then
    $as_root apt-get update -qq && $as_root apt-get install -y -qq --no-install-recommends libcriterion-dev
else
    echo 'The tests need Criterion: please install libcriterion-dev (Debian, Ubuntu),' >&2
    echo 'criterion (Homebrew, Arch), or build it from its sources.' >&2
    exit 1
fi
