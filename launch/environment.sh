# Sourced by the scripts that need `.venv`: makes it with the extras named, once for each pyproject.
#   source launch/environment.sh; need_environment test
need_environment() {
  local extras=$1 stamp
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), sys.version' ||
      { echo "error: Python 3.11, 3.12 or 3.13 is needed; set PYTHON to one" >&2; return 1; }
    "${PYTHON:-python3}" -m venv .venv || return 1
  fi
  stamp=".venv/.installed-$extras"
  if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    .venv/bin/python -m pip install --quiet --editable ".[$extras]" || return 1
    touch "$stamp"
  fi
}
