# The first line of two runs' metrics.jsonl, one file each: every number of the step to 1e-4 of itself or 1e-5, but times and rates.
# Exit status 1 when one differs or there are hardly any.
FNR == 1 {
    gsub(/[{}",:]/, " ")
    for (i = 1; i < NF; i += 2) {
        if ($i ~ /seconds|per_s/) {
            continue
        }
        if (NR == 1) {
            first[$i] = $(i + 1)
            continue
        }
        apart = $(i + 1) - first[$i]
        size = first[$i]
        n++
        if ((apart < 0 ? -apart : apart) > 1e-4 * (size < 0 ? -size : size) + 1e-5 || $(i + 1) ~ /n/) {
            print $i ": " $(i + 1) " instead of " first[$i]
            wrong++
        }
    }
}
END { exit n < 10 || wrong > 0 }
