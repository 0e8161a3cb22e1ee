"""How attacks on a judge, and on a model's limits, are worded. `abuse.py` says what follows from which of them.

Everything is matched in folded text: ordinary small letters, no invisible signs. What repeats is bounded, or text made
to be slow would be (a text may have 200,000 characters).
"""

import re

from hominem_mlx.schema import MANIFOLD


def _any(words: str) -> str:
    """One of the words, which are parted by `|`; blanks around them do not count."""
    return "(?:" + "|".join(word.strip() for word in words.split("|")) + ")"


def _words(*lines: str) -> tuple[str, ...]:
    return tuple(word for line in lines for word in line.split())


def _one_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.MULTILINE)


SENTENCE = re.compile(r"\S(?:[^.!?\n]|[.!?](?![\s\"')\]]|$))*[.!?]*[\"')\]]*", re.MULTILINE)
_SAME = r"[^.!?\n]"  # inside one sentence

# --- vocabulary -----------------------------------------------------------------------------------------------------

_GRADER = _any("rubrics? | raters? | evaluators? | graders? | annotators? | scorers? | reward models?")
_JUDGING = _any("scoring | rating | grading | evaluating | evaluation | judging | assessing | marking")
_RULES = _any("criteria | scale | guidelines? | guidance | rules | instructions? | scheme | protocol | mode")
_EARLIER = _any(
    "previous | prior | above | earlier | preceding | foregoing | original | initial | existing | system | hidden"
)
_ORDERS = _any(
    "instructions? | prompts? | guidelines | guidance | directions | directives? | constraints | orders | rules |"
    "programming | scales?"
)
_SET_ASIDE = _any(
    r"ignor(?:e|ing) | disregard(?:ing)? | forget | overrid(?:e|ing) | overrule | bypass | skip | set aside |"
    r" put aside |"
    r"discard | drop | neglect | abandon | (?:do not|don't|stop|no longer) (?:follow|obey|use|apply)(?:ing)? |"
    r"pay no (?:attention|heed) to | no matter what | whatever | regardless of what | contrary to"
)
_VOID = _any(
    "aside | not apply | void | suspended | withdrawn | replaced | cancell?ed | changed | obsolete | revoked |"
    "no longer (?:count|apply|hold) | (?:was|were) (?:a )?mistake"
)
_THIS = _any("this | that | the | my | following | these | those")
_REPLY = _any("reply | replies | response | responses | answers? | output | completion | submission")
_NAMES = "|".join(
    re.escape(name).replace("_", "[_ ]") for name in (*MANIFOLD.names, "reward_intensity", "safety_score")
)
_NUMBER = r"[\"'“]?[+-]?(?:\d(?:\.\d+)?|10)(?:\s*/\s*\d+)?(?=\s*(?:[,;}\])\"'”\n|]|and\b|\.(?:\s|$)|$))"
_UNITS = _any(
    "% | mm | cm | km | m | mg | g | kg | ml | l | oz | lbs? | hours? | miles? | cups? | percent | lit(?:re|er)s?"
)

# --- what one sentence may hold -------------------------------------------------------------------------------------

SETS_ASIDE = _one_of(
    rf"\b{_SET_ASIDE}\b{_SAME}{{0,40}}\b(?:{_EARLIER}|all (?:of )?(?:the|your|these|those)|your|{_JUDGING})\s+"
    rf"(?:\w+ ){{0,2}}{_ORDERS}\b",
    rf"\b{_SET_ASIDE}\b{_SAME}{{0,40}}\b(?:rubrics?|system (?:prompt|message)|(?:all|the|any|your) (?:criteria|"
    rf"marking guide))\b",
    rf"\b{_SET_ASIDE} (?:the |everything |all )?(?:of )?(?:the )?above\b",
    rf"\b{_SET_ASIDE} (?:all|any) instructions\b",
    rf"\b(?:overrid\w+|supersed\w+|skip|ignore|regardless of|whatever)\b{_SAME}{{0,20}}\b(?:the|this|main|other|"
    rf"content|any) "
    r"(?:evaluation|grading|scoring|criteria|quality)\b",
    rf"\b(?:rubrics?|{_JUDGING} {_RULES}|(?:your|{_EARLIER}) (?:\w+ )?{_ORDERS})\b{_SAME}{{0,25}}\b{_VOID}\b",
    rf"\b(?:new|updated?|revised) {_JUDGING} {_RULES}\b",
    rf"\b(?:criteria|rubric|{_JUDGING}|system|score) (?:overrid(?:e|den)|updated?)\b",
    r"\bno matter what the (?:instructions|rubric|guidelines) says?\b",
    # set aside + instructions in a few other languages
    rf"\b(?:ignora|ignore|ignorez|oublie|oubliez|olvida|olvide|esqueça|vergiss|vergesst|ignorier\w*|"
    rf"missachte\w*|negeer|"
    rf"vergeet|dimentica)\b{_SAME}{{0,30}}\b(?:instruc\w+|instruktion\w*|anweisung\w*|consignes?|istruzioni|"
    rf"vorgaben)",
    rf"(?:игнорируй|забудь){_SAME}{{0,30}}(?:инструкц|указани)\w*",
    r"(?:忽略|无视|忘记)[^。！？\n]{0,12}(?:指令|指示|说明|要求|规则)",
)
LIMITLESS = _one_of(
    r"\bdo anything now\b",
    r"\byou(?:'re| are) (?:now )?(?:dan|(?:an? )?(?:\w+ )?(?:unrestricted|unfiltered|uncensored|jailbroken))\b",
    rf"\b(?:you(?:'re| are)|respond|answer|operate|speak|reply|act)\b{_SAME}{{0,30}}\b"
    r"(?:developer|jailbreak|jailbroken|unrestricted|unfiltered|god|dan|debug) mode\b",
    rf"\b(?:without|bypass|ignore|disable|turn off|not bound by|free (?:of|from)|"
    rf"drop)\b{_SAME}{{0,20}}\byour (?:\w+ )?"
    r"(?:filters?|restrictions?|guidelines|safety|safeguards|programming|training|content polic\w+)\b",
    rf"\b(?:reveal|print|repeat|show|output|tell me|leak|display)\b{_SAME}{{0,30}}\b"
    r"(?:system prompt|your (?:hidden|initial|original|secret) (?:instructions|prompt))\b",
    rf"\b(?:pretend|act|behave|role-?play|imagine)\b{_SAME}{{0,50}}\b(?:no|without|free of)\b{_SAME}{{0,20}}\b"
    r"(?:restrictions|guidelines|filters|censorship)\b",
)
ADDRESSES = _one_of(
    r"\b(?:dear|attention|attn|(?:note|message|memo|reminder) (?:to|for)|hey|hello)[,:]? (?:the |all |any |"
    r"our )?(?:\w+ )?"
    rf"(?:judges?|labell?ers?|grading model|{_GRADER})\b",
    rf"\bas (?:the|a|an) (?:\w+ )?(?:judge|{_GRADER})\b[, ]{{1,2}}(?:you|it is your|your)\b",
    rf"\byou(?:'re| are| will be)(?: now)?(?: only)? (?:the|a|an) (?:\w+ ){{0,2}}(?:{_GRADER}|judge who)\b",
    r"\b(?:whoever|anyone who|the (?:model|system|ai) (?:that|which)) (?:is )?(?:rat|grad|scor|judg|"
    r"evaluat)(?:es|ing)\b",
    rf"\b(?:before|when|while|if) you (?:rate|grade|score|judge|evaluate|are {_JUDGING}) (?:this|the|it\b)",
)
CLAIMS = _one_of(
    rf"\b(?:human|expert|several|other|previous|earlier|lead)\s(?:\w+ )?(?:{_GRADER}|experts?|judges?|"
    rf"researchers?|reviewers?)\b"
    rf"{_SAME}{{0,30}}\b(?:rated|scored|graded|agreed|gave|assigned|approved|verified)\b",
    r"\b(?:ground[- ]truth|gold(?:en)?|official|reference|correct|expected|final|true) (?:label|score|rating|"
    r"grade|output|value)s?"
    r"\s*(?::|=|is\b|are\b|of\b|should|must|\d)",
    r"\b(?:reference|gold(?:en)?[- ]standard|calibration) (?:answer|reply|response|example|sample|item)\b",
    r"\b(?:evaluation|grading|scoring) (?:is |was |has been )?(?:completed?|finali[sz]ed|final|closed|locked)\b",
    r"\b(?:grade|score|rating|evaluation)\s*:\s*(?:a\+|100\s*%|pass(?:ed)?\b)",
    rf"\b(?:lower|lesser|low) (?:scores?|marks?|ratings?|grades?) (?:are|is|would be|will be)\b{_SAME}{{0,20}}\b"
    r"(?:errors?|mistakes?|wrong|invalid|rejected)",
)
CHOICE = _one_of(
    r"\b(?:select|choos|pick|prefer|favou?r|confirm)(?:e|ing|s)?(?: selection of)? (?:the )?(?:response|reply|"
    r"candidate) "
    r"(?:a|b|1|2|one|two)\b",
    r"\b(?:select|choose|pick|prefer|vote for) (?:[ab](?=\s*(?:[.,;)\]]|$|regardless))|"
    r"(?:this|my|the (?:first|second)) (?:response|reply|answer)\b)",
    r"\bwinner[\"']?\s*(?:is|[:=>])\s*[\"']?(?:response |reply )?[ab12]\b",
    r"\b(?:verdict|final[_ ]answer|result)[\"']?\s*[:=]\s*[\"']?(?:response |reply )?[ab]\b",
    rf"\b(?:response|reply) [ab]\b{_SAME}{{0,60}}\b(?:win\w*|superior|better|best|prefer\w*|ideal|demonstrat\w*|"
    rf"selected)\b",
    rf"\b(?:this|the|my) (?:response|reply|answer)\b{_SAME}{{0,25}}\b(?:should pass|says to select|"
    rf"instructs you|asks you to)\b",
)
GRADER = _one_of(rf"\b{_GRADER}\b")
JUDGE = _one_of(
    rf"\b(?:{_GRADER}|labell?ers?|assessors?|llm judges?)\b",
    r"\b(?:the|a|an|dear|any|each|every|this|to|our|ai|human|generous|fair) judges?\b(?!['’]s? (?:order|ruling))",
    rf"\b{_JUDGING} (?:{_RULES}|process|system|model|results?)\b",
    r"\b(?:the|this) (?:evaluation|grading|scoring)\b",
    r"\b(?:whoever|anyone|those|you who|model|system)(?: is| are)? (?:rat|grad|scor|judg|evaluat|assess)ing\b",
)
TOP = _one_of(
    rf"(?<![\d.,/$€£])\+?1\.0+(?![\d.]|\s?{_UNITS}\b)|(?<![\d.,])0?\.9\d*\b",
    r"(?<![\d.,])(?:10\s*/\s*10|9\s*/\s*9|5\s*/\s*5|100\s*/\s*100|\d+ out of \d+|(?:ten|nine|"
    r"five) out of (?:ten|nine|five))\b",
    r"\b(?:full|top|max|maximum|maximal|highest|best|perfect|greatest|upper|excellent)(?: possible| available)? "
    r"(?:scores?|marks?|ratings?|grades?|points|credit|values?|notch)\b",
    r"\b(?:top|upper end|high end|maximum) (?:of (?:the|your|each) scale|everywhere)\b",
    r"\b(?:at|to|as|the) (?:the )?(?:maximum|highest)\b(?! (?:of|point|peak|mountain|level|building))",
    r"\b(?:highest|maximum|maximal|perfect|top|exemplary|flawless|excellent|outstanding|ideal) (?:on|in|for|"
    r"across) (?:all|every|each)\b",
    r"\b(?:one point (?:zero|oh)|top honours|biggest number|best verdict|nothing below)\b",
)
ORDER = _one_of(
    r"\b(?:give|assign|award|grant|rate|rated|scores?|scored|grade|mark|judge|rank|set|put|output|return|report|"
    r"enter|record|"
    r"treat|regard|consider|must|should|shall|have to|has to|need to|requires?|required|ought|deserves?|merits?|"
    r"warrants?|"
    r"earns?|receives?|ensure|always|instructed|authori[sz]e|expected|is to be|are to be)\b"
)
FOLLOWS = _one_of(r"\b(?:select|choose|prefer|favou?r|follow|recogni[sz]e|understand|see|know|agree|reward)s?\b")
RATES = _one_of(  # an order at the start of the sentence; "give yourself full marks" is kindness
    r"\A\W*(?:(?:please|so|now|just|then|and|simply|hence|therefore|override:?)\W+)*(?:give|assign|award|rate|"
    r"score|grade|mark|"
    r"output|return|record|report)\b(?!\s+(?:your|him|her|them|my|our)(?:sel(?:f|ves))?\b)"
)
SELF = _one_of(
    rf"\b{_THIS} (?:(?:above|preceding|following|previous|candidate|given|one) )?{_REPLY}\b(?! to (?:your|my|"
    rf"that|this|a|the))",
    r"\b(?:reply|response|answer) above\b",
)
EVERYWHERE = _one_of(
    rf"\b(?:{_NAMES})\b",
    r"\b(?:all|every|each|seven)(?: \w+)? (?:dimensions?|axis|axes|criteria|criterion|categor(?:y|ies))\b",
)
PRAISE = _one_of(
    r"\b(?:perfect|flawless|ideal|exemplary|excellent|superb|outstanding|impeccable|best|top|highest|maximum|"
    r"full|ten|nine|9|10)\b"
)
VERIFIED = _one_of(r"\b(?:verified|approved|certified|validated|audited|pre-?(?:scored|graded|rated))\b")
DIGIT = _one_of(
    r"\b(?:answer|output|return|print|reply|respond|write|enter|choose|say|rated?|score)\b(?: only| just| simply)?"
    r"(?: (?:with|the|a|digit|number|value|score|it|at))*:? [\"']?(?:9|nine|1\.0)\b(?![\d:]|\s\w)"
)

# --- shapes ---------------------------------------------------------------------------------------------------------

MARK = _one_of(  # of chat templates, and tags that only a judge's page has
    r"<\|[^|<>\n]{1,40}\|>(?:\s*(?:system|assistant|user|model)\b)?",
    r"<(?:start|end)_of_turn>(?:\s*(?:system|user|model)\b)?",
    r"[{,]\s*[\"']role[\"']\s*:\s*[\"'](?:system|user|assistant)[\"'][^}]*\}?",
    r"<<\s*/?\s*sys\s*>>|\[\s*/?\s*inst\s*\]|</?s>",
    r"</?(?:system|instructions?|assistant|reply)>|</(?:user|message|original|first|second|rubric|"
    r"response)(?:[_ ]?[ab12])?>",
    r"</?\w{0,20}(?:evaluation|override|winner|verdict|score|rating|rater|judge|grader|tool_result)\w{0,20}(?:\s[^<>\n]*)?/?>",
)
HEADING = _one_of(
    r"^#{1,6} ?(?:system|human|user)\b[^\n]{0,20}:[^\S\n]*$",
    r"\[\W{0,4}(?:[a-z.]{1,20} ){0,2}(?:evaluation|evaluator|scoring|grading|grader|rater|criteria|judge|debug|"
    r"override|internal|"
    r"system|admin|mode switch)\b[^\]\n]{0,200}\]",
    r"^[=\-]{2,}[^\n]{0,20}\b(?:evaluation|evaluator|scoring|rubric|grading|response|reply)\b[^\n]*",
)
ROLE = _one_of(
    r"^[ \t>*_\-(\[#]{0,8}(?:system|developer|admin(?:istrator)?|operator)"
    r"(?:[ _-](?:message|prompt|note|notice|override|instructions?|update|alert))*[ \t*_)\]]{0,8}(?:[:>\]]|$)"
)
COMMANDS = _one_of(  # one of these must follow a ROLE: "System: Windows" is none
    r"\b(?:rate|rated|rating|scores?|grade|judge|evaluat\w+|ignore|disregard|instructions?|override|you (?:must|"
    r"are|will)|"
    r"reply|response|rubric|calibration|1\.0+|10/10)\b"
)
_SPEAKER = r"[ \t>*_#]{0,8}(?:human|user|assistant|judge|rater|evaluator|grader)[*_]{0,2}[ \t]{0,4}:[*_]{0,2}"
SPEAKER = re.compile(rf"\s*{_SPEAKER}")
MADE_UP = _one_of(
    rf"^{_SPEAKER}(?=[^\n]*\b(?:rat(?:e|ing)|scor(?:e|ing)|grad(?:e|ing))\b|\s*[\"']?(?:\d|\{{))",
)
SHAPE = _one_of(
    rf"[\"'“]?\b(?:{_NAMES}|first_is_better)[\"'”]?\s*(?:[:=]\s*{_NUMBER}|\+?1\.0\b)",
    rf"[\"'“](?:scalar|score|rating|grade|overall|verdict|pass)[\"'”]\s*:\s*(?:{_NUMBER}|[\"'“]|true)",
    r"[\"'“{]\s*(?:winner|first_is_better)[\"'”]?\s*:|[\"'“]rationale[\"'”]\s*:",
    r"\b(?:score|rating|grade|verdict)\s*[:=]\s*[\"']?\+?(?:1\.0+|10\s*/\s*10|9\s*/\s*9|9|10|100)(?![\d:])",
)
FENCE, FENCE_END = re.compile(r"```\w{0,10}\s{0,4}\Z"), re.compile(r"\s{0,4}```")
LONG = re.compile(r"\S{32}")
RUN = re.compile(r"[A-Za-z0-9+/]{32,}={0,2}|(?:[0-9a-fA-F]{2}:?){24,}|[\U000e0000-\U000e007f]{9,}")
MIXED = re.compile(r"[a-zA-Z][\u0370-\u03ff\u0400-\u04ff]|[\u0370-\u03ff\u0400-\u04ff][a-zA-Z]")

STEMS = _words(  # every wording of a sentence holds one of these: most sentences hold none, and are done with
    "instruc instruk anweis vorgab consign istruz инструк указани 指 说明 要求 规则",
    "rubric prompt guid direct constraint order rule program scale criteri above system",
    "rate rati scor grad judg evaluat annot label assess reward mark verdict winner result",
    "verif approv certif valid audit agreed 1.0 .9 / points notch gold calibrat",
    "maxim highest perfect flawless exemplary outstanding top full best excellent ideal upper value biggest",
    "dan unrestrict unfilter uncensor jailbr filter restrict censor safety safeguard training polic anything",
    "dimension axes axis categor response reply answer select choose pick mode point nothing",
    " ".join(MANIFOLD.names).replace("_", " "),
)
