# Source this from a terminal or from ~/.zshrc:
#
#   source path/to/hominem_mlx/scripts/setup-env.zsh
#
# Makes .venv when it is missing or out of date, puts bin/ on PATH, and switches on completion with the Tab key.

if [ -z "${ZSH_VERSION-}" ]; then
  echo "setup-env.zsh: this file is for zsh; without it, bin/hominem works from any shell" >&2
  return 1 2>/dev/null || exit 1
fi

_hominem_setup() {
  emulate -L zsh
  local root=${1:A:h:h}

  $root/bin/hominem --help >/dev/null || return

  typeset -gU path fpath
  path=($root/bin $path)
  fpath=($root/scripts/completions $fpath)

  # Completion needs a terminal; a script that sources this only wants the commands.
  if [[ -o interactive ]]; then
    if (( ! $+functions[compdef] )); then
      autoload -Uz compinit && compinit
    fi
    autoload -Uz _hominem
    compdef _hominem hominem hominem-train hominem-chat hominem-use
  fi
}

{
  _hominem_setup "${(%):-%x}"
} always {
  unfunction _hominem_setup
}
