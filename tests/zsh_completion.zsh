# What a real zsh, on a terminal of its own, lists with the script SCRIPT in the directory BOX, for lines that are typed to it.
# zsh -f zsh_completion.zsh SCRIPT BOX; prints what is wrong. Run by tests/cli_test.sh where zsh is installed.
zmodload zsh/zpty || exit 1
typeset -i failed=0
typeset out

zpty shell "env TERM=dumb $(readlink /proc/$$/exe) -f -i"
zpty -w shell "module_path=($module_path); fpath=($fpath); PS1='>'; stty cols 200; cd ${(q)2}"
zpty -w shell "autoload -Uz compinit; compinit -D -u; LISTMAX=10000; source ${(q)1}; compdef _nla nla"
zpty -w shell "shown() { print -n SHO''WN }; zle -N shown; bindkey '^T' list-choices '^X' shown; print READ''Y"
zpty -r shell out '*READY*'

offers() { # offers LINE WORD...: the list under the line has all of the words; of those behind -- none
    local line=$1 word wanted=1
    shift
    zpty -n -w shell $'\C-u'$line$'\C-t\C-x'
    zpty -r shell out '*SHOWN*'
    out=" ${${out#*$'\n'}//[[:space:]]##/ } "
    for word; do
        if [[ $word == -- ]]; then
            wanted=0
        elif [[ $out == *" $word "* ]] && ((!wanted)) || [[ $out != *" $word "* ]] && ((wanted)); then
            print -r -- "'$line': $word is $([[ $wanted == 1 ]] && print not) in $out"
            failed+=1
        fi
    done
}
setopt extended_glob
offers 'nla ' inspect data bench -- extract permute
offers 'nla data ' extract permute stats -- inspect
offers 'nla help data ' extract permute
offers 'nla train ' av ar rl
offers 'nla train rl lor' lora_rank lora_alpha -- lr
offers 'nla train rl moments=' f32 bf16
offers 'nla train rl out=' models/ runs/ -- texts.jsonl
offers 'nla generate --device ' cpu cuda
offers 'nla generate --' --max-tokens --seed -- --html
offers 'nla capture --in ' texts.jsonl models/
offers 'nla data build --stage ' av_sft ar_sft rl
offers 'nla data stats rows ' parts/ -- texts.jsonl
offers 'nla bench ' linear all
exit $((failed > 0))
