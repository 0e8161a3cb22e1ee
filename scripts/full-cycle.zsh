#!/usr/bin/env zsh
# The whole line, once, from seed prompts to a judged adapter:
#
#   scripts/full-cycle.zsh                                     in $HOMINEM_HOME, or ~/.hominem
#   scripts/full-cycle.zsh --home ~/trial                      somewhere else
#   scripts/full-cycle.zsh --config mine.toml dual.seed=3      any other argument goes to every command
#
# Each step reads what the step before it left in the home folder, and each keeps what it has when it is stopped:
# after an error, mend the cause and call this again. Stops at the first error with that command's exit code
# (1: judged not good enough, 2: bad input, 130: interrupted).

emulate -R zsh
setopt no_unset

readonly hominem=${0:A:h:h}/bin/hominem
local -a passed=()

while (( $# )); do
  case $1 in
    (-h|--help) sed -n '2,/^$/s/^# \{0,1\}//p' ${0:A}; exit 0 ;;
    (--home)
      if (( $# < 2 )); then print -ru2 -- "full-cycle: --home needs a folder"; exit 2; fi
      export HOMINEM_HOME=${2:a}; shift 2 ;;
    (--home=*) export HOMINEM_HOME=${${1#--home=}:a}; shift ;;
    (*) passed+=("$1"); shift ;;
  esac
done

integer number=0 code=0
step() {
  (( number += 1 ))
  print -ru2 -- "full-cycle: $number/9 hominem $*"
  $hominem "$@" "${passed[@]}" || {
    code=$?
    print -ru2 -- "full-cycle: hominem $* ended with exit code $code; stopped there"
    exit $code
  }
}

step data generate      # seed prompts, varied and made harder
step data sample        # several answers to each: good, bad and ambiguous
step data rate          # seven dimensions, intensity and safety for each answer
step data verify        # refuses labels that cannot be right
step data split         # by prompt, so that no prompt is on both sides
step data pair          # preferences, weighed by margin and intensity
step train reward       # frozen from here on
step train dual         # memories and preferences into one adapter
step evaluate policy    # held-out judgement against the model before

print -ru2 -- "full-cycle: done; bin/hominem chat talks with the result, bin/hominem status shows it"
