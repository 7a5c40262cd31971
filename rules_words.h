/* rules_words.h - what rules.c knows of English and of subjects: word lists, each sorted. A word may stand in several.
 * Only base forms are needed: rules.c finds -s, -ed, -ing and -er forms by itself. */
#ifndef RULES_WORDS_H
#define RULES_WORDS_H

enum { /* what a word can be; bits */
    P_DET = 1 << 0, /* determiner */
    P_POSS = 1 << 1,
    P_PREP = 1 << 2,
    P_SUBJ = 1 << 3, /* pronoun, subject only */
    P_OBJ = 1 << 4, /* pronoun, object only */
    P_PRON = 1 << 5, /* pronoun that is subject and object */
    P_BE = 1 << 6,
    P_HAVE = 1 << 7,
    P_DO = 1 << 8,
    P_MODAL = 1 << 9,
    P_COORD = 1 << 10, /* coordinates */
    P_SUB = 1 << 11, /* opens a subordinate clause */
    P_WH = 1 << 12, /* relative or question word */
    P_NOT = 1 << 13,
    P_NUMBER = 1 << 14,
    P_ADV = 1 << 15,
    P_ADJ = 1 << 16,
    P_VERB = 1 << 17,
    P_TAKES = 1 << 18, /* a verb that wants an object */
    P_PAST = 1 << 19, /* irregular past */
    P_PART = 1 << 20, /* past participle */
    P_NOUN = 1 << 21,
    P_INTJ = 1 << 22, /* interjection */
    P_NAME = 1 << 23, /* written with a capital */
    P_CODE = 1 << 24, /* a word of programs */
    P_DULL = 1 << 25, /* never a topic */
    P_COMMON = 1 << 26, /* seldom a topic */
    P_ED = 1 << 27, /* regular past or participle */
    P_ING = 1 << 28, /* -ing form */
    P_S = 1 << 29, /* -s of a verb or of a noun */
    P_PLURAL = 1 << 30, /* -s of a noun that is no verb */
};

static const struct {
    unsigned pos;
    const char *words;
} word_classes[] = {
    {P_DET,
        "a all an another any both certain each either enough every few half less many more most much neither no several some "
        "such the these this those various whatever"},
    {P_POSS,
        "her his its my our their whose your"},
    {P_PREP,
        "about above across after against along amid among amongst around as at before behind below beneath beside besides "
        "between beyond by concerning despite down during except for from in inside into like near of off on onto opposite "
        "out outside over past per regarding since than through throughout till toward towards under underneath unlike until "
        "unto up upon versus via with within without"},
    {P_SUBJ,
        "he i she they we"},
    {P_OBJ,
        "herself him himself itself me myself ourselves thee them themselves us yourself yourselves"},
    {P_PRON,
        "all another anybody anyone anything both each everyone everything few it many most nobody none nothing one others "
        "several some somebody someone something such that these this those thou what who ye you"},
    {P_BE,
        "am are aren't art be been being he's here's i'm is isn't it's she's that's there's they're was wasn't we're were "
        "weren't what's who's you're"},
    {P_HAVE,
        "had hadn't has hasn't hath have haven't having i've they've we've you've"},
    {P_DO,
        "did didn't do does doesn't don't dost doth"},
    {P_MODAL,
        "can can't cannot could couldn't he'd he'll i'd i'll it'll may might must mustn't ought shall shan't she'd she'll "
        "should shouldn't they'd they'll we'd we'll will won't would wouldn't you'd you'll"},
    {P_COORD,
        "and but nor or yet"},
    {P_SUB,
        "after although as because before if lest once provided since so than that though till unless until when whenever "
        "where whereas wherever whether while"},
    {P_WH,
        "how what when where which who whom whose why"},
    {P_NOT,
        "n't never not"},
    {P_NUMBER,
        "billion dozen eight eleven fifth fifty first five forty four fourth hundred million nine one second seven six ten "
        "third thirty thousand three twelve twenty two zero"},
    {P_ADV,
        "about actually again almost alone along already also alternatively altogether always anyway apart around "
        "automatically away back badly barely below best better beyond briefly carefully certainly clearly closely commonly "
        "completely correctly currently deeply directly down early easily effectively either else elsewhere enough entirely "
        "equally especially essentially eventually ever everywhere exactly explicitly extremely fairly far fast finally first "
        "forever formerly forth forward frequently fully further furthermore generally gradually greatly hardly hence here "
        "highly home how however immediately indeed individually initially instead internally just largely last late later "
        "least less likely little long manually maybe meanwhile merely moreover mostly much namely nearly necessarily never "
        "nevertheless newly next not now nowhere off often once only optionally originally otherwise out over overall "
        "partially particularly perhaps possibly potentially presumably previously primarily probably properly quickly quite "
        "rarely rather readily really recently relatively respectively roughly seldom separately significantly similarly "
        "simply slightly slowly so sometimes somewhat soon specifically still strictly strongly subsequently suddenly surely "
        "then there thereby therefore thereof though through thus together tomorrow too truly twice typically unfortunately "
        "up usually very well yesterday yet"},
    {P_ADJ,
        "able abstract active actual additional advanced alive alternative anarchist ancient anonymous apparent appropriate "
        "arbitrary asynchronous available aware bad bare basic beautiful best better big binary black blue brief bright broad "
        "broken capable capitalist careful central certain cheap clean clear close cold collective common compatible complete "
        "complex concrete conditional consistent constant convenient cool correct corresponding critical cross crucial cruel "
        "current dangerous dark dead deaf dear decimal deep default democratic different difficult direct dirty distinct "
        "double dry due early eastern easy economic efficient electronic empty entire equal equivalent essential evil exact "
        "excellent executable existing experimental explicit external extra false familiar famous far fast federal final fine "
        "finite flat foreign formal former free frequent fresh full fundamental funny further future general generic gentle "
        "glad global good graphical gray great greater green guilty half handy happy hard heavy helpful hexadecimal hidden "
        "high higher historical holy horizontal hot huge human identical immediate immutable important impossible "
        "incompatible incorrect independent individual industrial inner innocent integral intellectual interactive "
        "interesting internal international invalid invisible kind large larger last late latest latter lazy least left legal "
        "less libertarian likely linear literal little local logical long longer low lower loyal mad main major manual "
        "massive maximum mean meaningful medieval mental military minimal minimum minor modern moral multiple mutable mutual "
        "naked narrow national native natural necessary negative new next nice noble normal northern notable null numeric "
        "obvious odd official old older online only open opposite optional ordinary original other outer own parallel partial "
        "particular past perfect permanent persistent personal physical pink plain political poor popular portable positive "
        "possible potential powerful practical precise present previous primary private probable proper proud public pure "
        "quick quiet rapid rare raw ready real recent recursive red redundant relative relevant reliable remote responsible "
        "rich right rough round royal sad safe same scientific secondary secret secure senior sensitive separate serious "
        "several severe sharp short sick significant silent similar simple single slow small smooth social socialist soft "
        "solar sole solid sound southern special specific spiritual square stable standard static steady strange strict "
        "strong stupid subsequent successful sudden sufficient suitable sure sweet symbolic synchronous tall technical "
        "temporary terrible thick thin tight tiny top total tough traditional transparent true typical ugly unable unique "
        "universal unknown unsigned unused upper useful usual vague valid vast verbose vertical virtual visible vital "
        "vulnerable warm weak western wet white whole wide wild willing wise wonderful worse worst worth wrong yellow young"},
    {P_VERB,
        "accept access achieve acknowledge acquire act activate adapt add address adjust admit adopt advise affect agree aid "
        "aim alert alias allocate allow alter analyze announce answer appear append apply approach argue arise arrange arrive "
        "ask assert assign assist associate assume attach attack attempt attend authenticate avoid await backup base be bear "
        "beat become beg begin believe belong benefit bind block blow boot borrow bother branch break bring browse build burn "
        "buy calculate call cancel capture care carry cast catch cause change charge check choose claim clean clear click "
        "clone close collect combine come commit communicate compare compile complain complete comprise compute concern "
        "conclude configure confirm confuse connect consider consist construct consume contact contain continue contribute "
        "control convert copy correct correspond cost count cover crash create cross cry cut deal debug decide declare decode "
        "decrease define delay delete deliver demand deny depend deprecate derive describe deserve design desire destroy "
        "detach detect determine develop devote die differ disable disappear discard disconnect discover discuss display "
        "distinguish distribute divide do document dominate doubt download drag draw dream drive drop dump earn eat edit "
        "elect eliminate emit emphasize employ enable encode encounter encourage encrypt end enforce engage enhance enjoy "
        "ensure enter equal escape establish evaluate evolve examine exceed exclude execute exercise exist exit expand expect "
        "experience explain explicitly exploit explore export expose express extend extract face fail fall favor fear feel "
        "fetch fight fill filter find finish fit fix flatten flee flow flush fly follow forbid force forget fork form format "
        "free freeze fulfill function gain gather generate get give go govern grant grow guarantee guard guess guide handle "
        "hang happen hate have hear help hide highlight hit hold hope hurt identify ignore illustrate imagine impersonate "
        "implement imply import impose improve include increase increment indicate infer influence inform inherit initialize "
        "insert insist inspect install instruct intend interact interpret interrupt introduce invent invest invite invoke "
        "involve issue iterate join judge jump justify keep kill kiss know lack laugh launch lay lead leak learn leave lend "
        "let lie lift limit link list listen live load locate lock log look lose love maintain make manage manipulate map "
        "mark marry match matter mean measure meet mention merge migrate mind miss mix modify monitor mount move multiply "
        "name need negotiate notice notify obey observe obtain occupy occur offer omit open operate oppose order organise "
        "organize override overwrite own pack paint parse participate pass paste patch pause pay perform permit persist "
        "pertain pick place plan play point possess post pray precede predict prefer prepare preserve press presume pretend "
        "prevent print proceed process produce program promise prompt propose protect prove provide publish pull purchase "
        "push put query quit quote raise reach react read realize rebase reboot receive recognize recommend record recover "
        "redirect reduce refer reflect refresh refuse regard register reject relate release rely remain remember remove "
        "rename render repair repeat replace reply report represent reproduce request require rescue resemble reserve reset "
        "resist resize resolve respect respond rest restart restore restrict result resume retain retrieve return reveal "
        "reverse review rewrite ride ring rise rotate rule run sacrifice satisfy save say scale scan schedule scroll search "
        "see seek seem select sell send separate serve set settle shape share shift ship shoot show shut sign signal simplify "
        "sit skip sleep solve sort speak specify spend split spread stand start state stay steal step stick stop store strike "
        "strip struggle study submit subscribe substitute succeed suffer suggest suit sum supply support suppose suppress "
        "surprise surrender surround survive suspend swear sweep switch synchronize take talk teach tell tend terminate test "
        "thank think threaten throw tie touch trace track trade train transfer transform translate transmit travel treat "
        "trigger trust try turn type understand undo unify uninstall unite unload unlock unpack unset update upgrade upload "
        "use utilize validate vanish vary verify view violate visit vote wait wake walk want warn wash waste watch wear weep "
        "welcome win wipe wish wonder work worry wrap write yield zoom"},
    {P_TAKES,
        "accept access achieve acquire activate add adjust adopt affect allocate allow append apply assert assign assume "
        "attach attack avoid begin believe block boot bring build buy calculate call cancel capture carry cause change check "
        "choose clear click close collect compare compile compute configure connect consider construct contain control "
        "convert copy count cover create cut debug declare decode define delete deliver deny describe design destroy detect "
        "determine develop disable discard discover display divide download draw drop edit eliminate emit employ enable "
        "encode encounter encourage encrypt enforce ensure enter establish evaluate examine exceed exclude execute expect "
        "explain export expose express extend extract face fetch fight fill filter find finish fix follow force format gain "
        "generate get give grant handle hate have hear help hide hit hold identify ignore implement imply import impose "
        "improve include increase indicate inform inherit initialize insert install introduce invoke involve join justify "
        "keep kill know lack launch leave let limit load lock lose love maintain make manage map mark match measure meet "
        "mention merge modify monitor mount move name need notice notify obey obtain offer omit open override overwrite own "
        "pass perform permit place preserve press prevent print process produce propose protect prove provide publish push "
        "put query raise reach read receive recognize recommend record recover reduce reflect refuse register reject release "
        "remember remove rename render replace represent require reserve reset resolve restore restrict retain retrieve "
        "return reveal reverse rewrite run satisfy save say see seek select sell send serve set share show skip solve specify "
        "split start state steal store submit suggest supply support suppress surround take teach tell terminate test think "
        "throw trace track transfer transform translate treat trigger trust turn type understand uninstall unpack update "
        "upgrade use validate verify view violate visit want warn watch wear win wish wrap write yield"},
    {P_PAST,
        "arose ate became began bore bought broke built came caught ceased chose cut dealt died drank drew drove dwelt fell "
        "felt fled flew forgot fought found gave got grew heard held hid hung kept knew lay led left let lost made meant met "
        "paid quoth ran rang rode rose said sang sat saw sent shook shot slept slew sought spent spoke spread stood struck "
        "swore taught thought threw told took understood went won wore wrote"},
    {P_PART,
        "beaten become been begun bitten born bought bound broken brought built caught chosen cut done drawn driven eaten "
        "fallen flown forgiven forgotten fought found frozen given gone grown heard held hidden hit hung kept known led left "
        "lost made met overridden paid put read rewritten risen said seen sent set shaken shown shut slain sought spent split "
        "spoken stolen struck sung sworn taken taught thought thrown told torn understood undone won worn woven written"},
    {P_NOUN,
        "ability access accident account acid act action activity actor addition address administrator advantage advice "
        "affair age agency agent air algorithm allocation amount analysis anarchism anarchist anarchy animal answer apparatus "
        "appearance appendix application approach area argument arm army array arrow art article aspect assembly assertion "
        "assignment association assumption atom attack attempt attention attitude attribute audience authentication author "
        "authority average backend background backup balance bandwidth bank bar base basis battle beast beauty beginning "
        "behavior behaviour being belief benefit bird birth bit block blog blood board body book boolean border bottom "
        "boundary box boy brain branch bread bridge brother browser bucket budget buffer bug building bus business button "
        "byte cable cache calendar call camera candidate capability capacity capital capitalism capitalist captain car card "
        "care case category cause cell center centre century chain chance change channel chapter character charge chart child "
        "children choice church circle circuit citizen city claim class clause client clock cloud cluster code collection "
        "color colour column combination comma command comment commission committee communication community company "
        "comparison compiler completion complexity component compression computer concept conclusion condition conduct config "
        "configuration conflict congress connection consequence console constant constellation constitution constraint "
        "constructor consumer contact container content context contract contrast contribution control controller "
        "conversation conversion copy copyright core corner corporation cost council country course court cpu creation crime "
        "crisis crowd culture currency cursor curve customer cycle damage danger data database date daughter day death debt "
        "decade decision declaration default definition degree delay delimiter demand democracy dependency deployment depth "
        "description descriptor design desire desktop destination detail developer development device diagram dialog "
        "dictionary difference digit dimension direction directory disk display distance distribution district document "
        "documentation dog domain door doubt dragon drawing dream drive driver dwarf earth economy edge edition editor "
        "education effect effort egg election element elf email emergency emotion employer encoding encryption end enemy "
        "energy engine engineer entity entry environment equality equation error escape estate event evidence evil example "
        "exception exchange execution exercise existence expansion expense experience experiment explanation exploitation "
        "exponent export expression extension extent eye face fact factor factory failure faith family farmer father fault "
        "fear feature field figure file filename filesystem filter finger fire firewall firmware fish flag flesh float flow "
        "flower folder folk font food foot force foreground forest form format formula foundation fraction fragment frame "
        "framework freedom friend front fruit fun function functionality future game garden gate gateway generation generator "
        "genius gentleman girl glass goal god gold goods government grammar graph graphics grass ground group growth guard "
        "guest guide guideline gun hair hall hand handle handler hardware harm hash hat head header heading health heap heart "
        "heat heaven height hell help hierarchy hill history home honour hook hope horse host hour house humanity husband ice "
        "icon idea identifier identity illusion image impact implementation importance improvement inch income index "
        "individual industry influence information inheritance initialization innovation input insect insertion inspection "
        "installation installer instance institution instruction integer integration intelligence intent interaction interest "
        "interface internet interpretation interpreter interrupt interval introduction invention inventory investment iron "
        "island issue item iteration iterator job joke journal journey judge judgment jury justice kernel key keyboard "
        "keyword king kingdom knight knowledge label labor labour lack lady lake land language laptop law lawyer layer layout "
        "leader leadership leaf legend length letter level liberty library licence license life light limit limitation line "
        "link linux list listing literal literature load loader location lock log logic loop lord loss love machine macro "
        "magazine magic magnitude mail mailbox maintainer majority maker man management manager mankind manner manual map "
        "margin mark market marriage mask mass master match material mathematics matrix matter maximum meaning means measure "
        "measurement mechanism media medicine medium meeting member memory men menu merchant mercy merge message metadata "
        "metal method middle mind minimum minister minority minute mirror mistake mixture mode model modifier module moment "
        "money monitor month mood moon morning mother motion mountain mouse mouth movement murder museum music myth name "
        "namespace nation nature necessity need neighbor network news newspaper night node noise north nose note nothing "
        "notice notion noun novel number object objective observation occasion ocean office officer offset oil operand "
        "operation operator opinion opportunity opposition option orc order organ organisation organization orientation "
        "origin output overhead owner ownership pack package packet page pain pair palette panel paper paragraph parameter "
        "parent parliament parser part particle partition partner party passage passphrase password past patch path pattern "
        "pause payment peace peasant people percent performance period peripheral permission person perspective petition "
        "phase phenomenon philosopher philosophy phone phrase physics picture piece pilot pipe pixel place plan planet plant "
        "platform player pleasure pledge plugin poem poet poetry point pointer poison police policy politician politics pool "
        "poor population port portion position possession possibility pound poverty power practice prayer precision "
        "predecessor prefix presence president pressure price priest prince princess principle printer priority prison "
        "prisoner privacy privilege problem procedure process processor product production profession professor profile "
        "profit program programmer programming progress project proletariat promise proof property prophet proportion "
        "proposal proposition protection protocol province proxy public publication pulse purpose quality quantity query "
        "question queue quotation quote race radio range rank rate ratio ray reader reality reason receipt recipe recipient "
        "record recovery recursion reference reform regard region register registry regulation relation relationship relative "
        "release relief religion remark replacement reply report repository representation representative request requirement "
        "research reset resistance resolution resource respect response responsibility restriction result revenue revision "
        "revolution rib rice right risk river road robot rock role room root rope router routine row rule ruler runtime saint "
        "salt sample sand savings scale scenario sceptre schedule schema scheme school science scientist scope score screen "
        "script sea season seat second secret secretary section sector security seed segment selection semantics senate "
        "senator sense sentence sequence series servant server service session setting setup shadow shape share shell shelter "
        "shield ship shock shop shore side sign signal signature silence silver sin sister site situation size skill skin sky "
        "slash slave slider slot smile snow socialism society socket software soil soldier solution son song sort soul sound "
        "source space speaker species specification speech speed spell spirit spring square stack staff stage stake standard "
        "star state statement statistics status step stock stone storage store storm story strategy stream street strength "
        "string structure struggle student studio study stuff style subclass subject submission subroutine subscription "
        "subset substance substitution success suffix sugar suggestion sum summary summer sun superclass superuser supply "
        "support surface surprise switch sword symbol symlink syntax system tab table tag tail tale talent target task tax "
        "tea teacher team technique technology teeth template temple term terminal terminology territory test text theme "
        "theorem theory thing thread threat threshold throne thumb ticket tile time timeout timer timestamp tip title token "
        "tongue tool toolbox tooth top topic touch tower town trace trade tradition traffic training transaction transfer "
        "transformation transition translation transmission transport travel treatment treaty tree trial tribe trick trigger "
        "trip troop trouble truth tuple turn tutorial type typo union unit universe university upgrade usage user username "
        "utility validity value variable variant variation variety vector verb verse version vertex victim victory video view "
        "village violence virtue visitor voice volume vote wage wait wall war warning warrior waste water wave way wealth "
        "weapon weather web website week weight wheel whitespace wife wind window wine winter wire wisdom witch witness "
        "wizard woman women wood word work worker workers workspace world worship worth wound wrapper writer writing yard "
        "year youth zone"},
    {P_INTJ,
        "ah alas aye ha hail hello hey lo nay no oh ok okay please thanks ugh well wow yes"},
    {P_NAME,
        "april august december february friday january july june march monday november october saturday september sunday "
        "thursday tuesday wednesday"},
    {P_CODE,
        "args argv awk bar baz bool char const def dict echo elif elsif endif enum esac eval exec fi foo foreach fprintf grep "
        "ifdef ifndef init int isinstance kwargs lambda len malloc null nullptr printf sed self size_t sizeof stderr stdin "
        "stdout str struct sub sudo typedef uint32_t uint64_t uint8_t unsigned void"},
    {P_DULL,
        "able above according actual add again all allow also always another any appear ask available back based become begin "
        "being believe believed below best better bit both bring call called cannot case certain change com come common "
        "consider contain contains course create current day default describe different do done dont due each either else end "
        "enough etc even ever every example exist far feel few find first follow following form found full general get give "
        "given go going good great had half hand have help here high hold how however html http https important include "
        "instead it just keep kind know known large last late later least leave left less let life like line little long look "
        "lot made main make man many may mean means men might more most move much must name near need never new next not note "
        "nothing now number often old once one only open order org other own part particular people perhaps person place play "
        "point possible provide provided put quite rather read really reason refer require required result return returned "
        "returns right run said same say second section see seem seen set several shall should show similar simple simply "
        "since small so some something sometimes sort specific specified start still stop such sure take tell term than then "
        "there therefore thing think third though thought through thus time together too took top true try turn two txt type "
        "under up upon use used useful user using usually value various very want way well went what while who whole why will "
        "within without word work world would write written www year yes yet you"},
    {P_COMMON,
        "access action actually address against allowed already although application argued argument arguments associated "
        "attempt author automatically avoid bad base basic before beginning behavior big body build built cases cause change "
        "changed changes character characters check choose class clear close code command commands complete computer "
        "condition conditions considered content contents control copy correct corresponding count data date define defined "
        "definition description design details determine development direct directly directory display document documentation "
        "effect empty enable enabled entire entry environment equal error especially etc event exactly except existing "
        "expected extension fact false feature features field fields figure file files final find format free fully function "
        "functions future generally generated group groups handle hard head home human idea ideas immediately implementation "
        "implemented implicit information input instance int internal issue item items key language left length level light "
        "limit limited list lists load local location log lower making manual match matter maximum meaning memory message "
        "messages method methods mind mode model multiple named names natural nature necessary needed needs normal normally "
        "notes null numbers object objects occur operation operations option optional options original others output outside "
        "page parameter parameters parts pass passed path pattern perform period point points position power present previous "
        "print problem problems process produce program programs project property purpose question range real reference "
        "related remove removed report request resource resources rest rule rules running sample search sense separate "
        "sequence service sets settings short side single size software source space special stand standard state statement "
        "states status step stored string strings structure style subject support supported system systems table taken target "
        "test text things three times title tool tools total tree types understand unique update uses valid values variable "
        "variables version versions view ways whether wide works writing written wrong zero"},
};

/* Subjects: names to choose from, words of which one must be there to say the name (NULL: none), words that speak for it. */
static const struct {
    const char *name, *needs, *words;
} domains[] = {
    {"political theory and argument|anarchist or socialist politics|political and social theory", NULL,
        "anarchism anarchist anarchists anarchy bakunin bookchin bourgeois bourgeoisie capitalism capitalist capitalists "
        "chomsky collective communism communist domination emancipation equality exploitation expropriation goldman "
        "hierarchical hierarchy individualist kropotkin labour libertarian libertarians liberty malatesta marx marxist "
        "marxists masses mutual oppression proletarian proletariat property proudhon revolution revolutionary rothbard ruling "
        "self-management social socialism socialist socialists solidarity state statist stirner strike strikes struggle "
        "syndicalism syndicalist tucker union unions wage wages worker's workers"},
    {"revolutionary history|the history of revolution and war|political history", NULL,
        "army barcelona bolshevik bolsheviks bolshevism catalonia cheka civil cnt commune congress dictatorship fai fascism "
        "fascist fascists franco insurrection kerensky kronstadt lenin makhno makhnovists mensheviks militia militias moscow "
        "october paris petrograd regime repression russia russian soviet soviets spain spanish stalin troops trotsky tsar "
        "uprising"},
    {"economics and markets|economic argument|economics", NULL,
        "austrian bank banks capital competition consumers credit currency demand economic economics economy firm firms goods "
        "growth hayek income industry inflation interest investment keynes keynesian labour market markets mises monetary "
        "money monopoly neo-classical price prices production profit profits rent supply tax taxes trade unemployment utility "
        "wages"},
    {"constitutional or legal text|state papers and law|law and government", NULL,
        "amendment article citizens clause congress constitution council court courts declaration elected elections federal "
        "government hereby herein impeachment independence jurisdiction justice law laws legal legislature minister office "
        "officers parliament powers president pursuant ratified representatives rights senate senators shall states territory "
        "thereof treason treaty united vote"},
    {"Python and its library|the Python language|Python programming", "python py import self def",
        "__init__ add_argument argparse args argumentparser asyncio attributeerror bytearray bytes class coroutine coroutines "
        "cpython decorator def dict docstring doctest elif exc false func generator getattr import importerror init__ "
        "interpreter isinstance iterable iterator itertools keyerror kwargs lambda metaclass meth mod namespace none "
        "parse_args pathlib pep pickle pip pyobject python self stdlib subclass traceback true tuple tuples typeerror "
        "unittest urllib valueerror venv versionadded versionchanged"},
    {"Perl and its library|the Perl language|Perl programming", "perl perl's cpan perldoc",
        "arrayref autoload backslash backtracking bless carp chomp cpan croak ebcdic exodist filehandle filehandles hash "
        "hashref interpolation lexical local makemaker moose my perl perl's perldelta perldoc perlfunc perlre pragma regex "
        "regexp regexps scalar scalars sigil stdin strict sub subroutine subroutines sv tainted typeglob utf8 wantarray "
        "warnings xs"},
    {"databases and SQL|SQL and its databases|relational databases", NULL,
        "aggregate column columns commit constraint constraints database databases foreign index indexes insert join jsonb "
        "oid operator pg_catalog pgsql planner plpgsql postgres postgresql primary privilege privileges psql publication "
        "queries query relation replication rollback row rows schema schemas select sql sqlite sqlstate standby subquery "
        "subscriber table tables tablespace transaction transactions trigger triggers tuple vacuum wal"},
    {"Git and version control|version control with Git|the Git tools", "git",
        "bisect blob branch branches checkout cherry-pick clone commit commits cvs diff fetch git git_dir head hooks hunk "
        "index linkgit merge merges origin pack packfile packfiles patch patches pull push rebase ref reflog refs refspec "
        "remote remotes repositories repository revision sha1 stash submodule submodules svn tag tags tree upstream worktree"},
    {"command-line tools and their options|commands of the shell|command usage", NULL,
        "argument arguments awk bash cat command commands cron daemon echo environment exit filename flag flags getopt grep "
        "help invoke invoked manpage option options pipe posix print prints prompt quiet script scripts sed shell stderr "
        "stdin stdout synopsis tar terminal usage verbose wildcard"},
    {"the kernel and its drivers|operating-system internals|kernel programming", NULL,
        "bindings boot bpf bus bytes cgroup cgroups clock clocks controller cpu cpus debugfs dentry device devices devicetree "
        "dma driver drivers ebpf filesystem filesystems firmware ftrace gpio hist hotplug hypervisor i2c inode inodes "
        "interrupt interrupts ioctl irq kernel kvm lock locking locks memory mmap mutex netdev node nodes numa offset page "
        "pages pci phandle procfs rcu register registers scheduler selftests spdx spi spinlock struct syscall syscalls sysfs "
        "tracepoint tracing usb userspace workqueue"},
    {"C programming|the C language|a C program or library", "void int char struct malloc printf gcc glibc",
        "arrlen buffer char compiler const define double endif enum errno extern float fprintf free gcc glibc header headers "
        "ifdef ifndef include inline int int64_t linker macro macros malloc memcpy null pointer pointers printf return size_t "
        "sizeof static strlen struct typedef uint32_t uint64_t uint8_t union unsigned void"},
    {"networking|computer networks|network configuration", NULL,
        "address addresses arpanet bandwidth client clients dhcp dns ethernet firewall ftp gateway host hosts http interface "
        "internet ip ipv4 ipv6 lan link netmask network networking networks packet packets port ports protocol protocols "
        "proxy router routes routing server servers socket sockets ssh ssl subnet tcp tls tunnel udp vpn wifi wireless"},
    {"system administration|packages and services of a system|administering servers", NULL,
        "administrator administrators apache apt apt-get backup backups conf config configuration cron daemon deb debian "
        "dependencies distribution dpkg install installed installing ldap login logs mail mirror nfs package packages "
        "password passwords permissions postfix release releases repositories repository root samba server service services "
        "sudo systemd ubuntu upgrade user users"},
    {"installing an operating system|installation and booting|system installation", NULL,
        "bios bookworm boot booting bootloader cd console debian debian-installer dhcp disk disks download dvd encrypted "
        "filesystem firmware grub hardware install installation installer installing iso kernel keyboard lvm machine media "
        "medium mirror partition partitioning partitions preseed preseeding raid stick swap uefi usb"},
    {"graphics and image editing|image editing|digital images", NULL,
        "alpha background blur brush brushes canvas channel channels click clicking color colors colour colours crop dialog "
        "dockable drawable filter filters foreground gimp gradient gradients grayscale hsv icon image images jpeg layer "
        "layers menu menubar opacity paint palette pencil pixel pixels png preview render rgb script-fu selection slider "
        "toolbox transparency transparent undo zoom"},
    {"computing terms and their history|the vocabulary of computing|computers and their makers", NULL,
        "abbreviation acronym algol algorithm ansi architecture circuit cobol company compiler computer computing dec "
        "developed distributed foldoc fortran functional graphics hardware ibm ieee intel iso jargon language lisp logic "
        "mainframe mainstream microprocessor microsoft mit object-oriented parallel pascal processor processors programming "
        "prolog proprietary software sun transistor unix vax vendor workstation"},
    {"hacker slang and lore|the jargon of hackers|hacker culture", NULL,
        "bar bogus coinage common cruft crufty emacs esr flame foo grep hack hacker hackerdom hackers hackish hacks jargon "
        "joke kludge kluge lossage luser lusers mainstream mit netnews newbie newbies pejorative programmer programmers slang "
        "techspeak unix usenet wizard wizards"},
    {"the meanings and origins of English words|English words and their senses|lexicography", NULL,
        "adj adjective adv adverb archaic cf chaucer colloq dryden esp etymology fig formerly fr genus gr icel imp manner "
        "milton ness noun obs pertaining pjc pl plural pref prefix prep pron prov quality resembling see shak spenser state "
        "suffix sw syn verb webster wordnet"},
    {"plants, animals and the body|natural history|biology and medicine", NULL,
        "anat animal animals biol bird birds blood body bone bones bot cell cells disease fish flower flowers fruit fungus "
        "genus herb insect insects larva leaf leaves mammal med medicinal medicine muscle nerve organ organs plant plants "
        "root roots seed seeds shell skin species stem tail teeth tissue tree trees wing wings zool"},
    {"chemistry and physics|the physical sciences", NULL,
        "acid acids atom atoms carbon chem chemical compound compounds crystal crystalline electric electricity element "
        "energy force gas heat hydrogen light liquid magnetic mass mechanics metal metals mineral minerals molecule nitrogen "
        "oxide oxygen particle physics pressure quantum radiation salt temperature velocity"},
    {"jokes, aphorisms and quotations|witty sayings|humour and quotations", NULL,
        "ambrose beer bierce computer cynic dave drink drunk einstein fool fools fortune funny genius god groucho husband "
        "joke laugh law laws lawyer lawyers marriage master men mencken murphy's politician quote rule sex shaw tao twain "
        "wife wilde wisdom woman women yow zen zippy"},
    {"fantasy adventure|a fantasy tale|fantasy war and quests", NULL,
        "army asheviere bandits battle castle cavalry delfador deoran dragon drake drakes dwarf dwarves dwarvish elensefar "
        "elf elves elvish enemies enemy ethiliel fight foul gryphon gryphons kalenz king kingdom knights konrad li'sar lich "
        "lord mage mages magic mebrin merfolk mermen necromancer orc orcish orcs prince princess queen reinforcements "
        "saurians sceptre sir skeleton skeletons soldiers sorcerer spell sword swords throne troll trolls undead warrior "
        "warriors wesnoth westin wizard"},
    {"astronomy and sky lore|stars and constellations|the night sky", NULL,
        "asterism asterisms astronomer astronomical astronomy celestial comet constellation constellations dipper eclipse "
        "equator galaxies galaxy heaven horizon lunar magnitude mansion mansions meteor milky moon myth mythology myths "
        "nebula orbit orion planet planets pleiades polaris scorpius sirius sky skyculture solar star stars stellarium sun "
        "taurus telescope ursa zenith zodiac"},
    {"religion and belief|religion|faith and scripture", NULL,
        "allah angel angels apostle bible blessed buddha christ christian christianity christians church devil divine faith "
        "god gods heaven hebrew hell holy islam jesus jewish karma muslim pope pray prayer priest priests religion religious "
        "ritual sacred saint saints scripture sin soul temple theology worship zen"},
    {"mathematics|mathematical matters|numbers and formulas", NULL,
        "algebra angle arithmetic cos cosine decimal derivative distribution equation equations exponent float floating-point "
        "fraction function gaussian geometry graph infinity integer integers integral logarithm matrix mean modulo polynomial "
        "precision prime probability product proof radius random rounding sin sine sqrt statistics sum theorem triangle "
        "variance vector vectors vertex"},
    {"software licensing|copyright and licence terms|licence conditions", NULL,
        "author authors conditions copies copyleft copyright copyrighted damages derivative disclaimer distribute fitness "
        "freely gfdl gnu gpl granted invariant liability liable licence license licenses merchantability modified notice "
        "permission proprietary purpose redistribute redistribution reserved rights terms warranty works"},
    {"cloud services|services in the cloud|cloud administration", "cloud gcloud aws azure",
        "alpha api aws azure beta billing bucket cloud cluster clusters container containers credentials deployment docker "
        "endpoint flatten gcloud google iam impersonate instance instances json kubernetes project projects quota region "
        "regions resource resources vm yaml zone"},
    {"literature and poetry|verse and literature", NULL,
        "author ballad comedy doth drama hamlet hath heart homer love lyric muse ne'er novel o'er poem poems poet poetry "
        "poets rhyme shakespeare song sonnet sorrow stanza sweet tale thee thou thy tis tragedy twas verse verses virgil"},
    {"web pages and markup|markup languages|HTML, XML and the web", NULL,
        "attribute attributes browser browsers cgi css docbook dtd element elements href html http https hyperlink javascript "
        "json link markup namespace sgml site stylesheet tag tags uri url urls web webpage www xhtml xml xslt"},
    {"security and cryptography|computer security", NULL,
        "attack attacker attackers authenticate authentication certificate certificates cipher crypto decrypt encrypt "
        "encrypted encryption exploit firewall gpg hash kerberos key keys malware md5 openssl pam password passwords pgp "
        "privileges rsa sandbox security selinux sha256 signature signed ssl tls token tokens trust virus vulnerabilities "
        "vulnerability"},
    {"testing and debugging|finding faults in programs", NULL,
        "assert assertion benchmark breakpoint bug bugs coverage crash crashes debug debugger debugging failure failures fix "
        "fixed fuzzing gdb log profiler profiling regression reproduce sanitizer test testing tests traceback valgrind"},
    {"mail and news groups|mailing lists and mail", NULL,
        "address attachment discussion email emails gnusenet header headers imap list lists mail mailbox mailing message "
        "messages mime newsgroup newsgroups posting postmaster posts recipient reply sender smtp spam subject subscribe "
        "usenet"},
    {"dates and time zones|the handling of time", NULL,
        "calendar clock date dates datetime daylight days epoch gmt gregorian hours julian leap minutes month months seconds "
        "strftime time timedelta timestamp timestamps timezone timezones tzinfo utc year years"},
    {"character sets and Unicode|text encoding", NULL,
        "alphabet ascii bidi byte bytes character characters charset code-point codepoint decode diacritics encode encoding "
        "encodings font fonts glyph glyphs iso-8859-1 latin-1 locale normalization script scripts unicode utf-16 utf-8 utf8"},
    {"sound and video|audio and video", NULL,
        "alsa audio bitrate camera channel codec dvb frame frames frequency microphone midi mixer mpeg music ogg pitch "
        "playback sample samples song sound sounds speaker stream tuner v4l2 video volume"},
    {"countries and places|geography and places", NULL,
        "africa america american asia border capital china cities city coast countries country east empire england europe "
        "france germany india island islands italy japan lake london mountain mountains north ocean population province river "
        "sea south territory town village west"},
    {"data compression and hashing|compressed data", NULL,
        "adler32 archive archives bitstream bzip2 checksum compress compressed compression crc crc32 decompress deflate "
        "dictionary gzip hash huffman inflate lzma stream window xxh xxhash xz zip zlib"},
    {"parallel programs|concurrency", NULL,
        "async atomic await barrier callback concurrency concurrent deadlock event future lock locks loop mpi mutex openmp "
        "parallel process processes queue race scheduler semaphore synchronization task tasks thread threading threads worker"},
    {"files and directories|the file system", NULL,
        "basename chmod copy delete directories directory extension file filename filenames files folder hardlink link mode "
        "mount path paths permissions rename root stat symlink symlinks umask"},
    {"language models and neural networks|machine learning", NULL,
        "activation activations attention batch checkpoint dataset embedding embeddings gradient gradients inference layer "
        "layers learning logits loss model models neural optimizer tensor tensors token tokenizer tokens training transformer "
        "weights"},
    {"everyday life|people and their affairs", NULL,
        "boy car cat child children daughter dinner doctor dog door family father food friend friends girl happy home house "
        "husband job kitchen love money morning mother night party phone room school son street wife"},
};

/* Other languages in Latin letters, by their small words. */
static const struct {
    const char *name, *words;
} foreign[] = {
    {"German",
        "auch auf aus bei das dass dem den der die ein eine einen einer für ist kann mit nach nicht oder sich sind und von "
        "wenn werden wird zum zur"},
    {"French",
        "aux avec ce ces cette dans des du elle est et il la le les leur mais nous ou par pas plus pour que qui sont sur une "
        "vous être"},
    {"Italian",
        "alla anche che come con da dal dei del della di essere gli ha il le lo nel non per più questo se si sono una è"},
    {"Spanish",
        "al como con cuando de del el en es esta este fue las lo los más no para pero por que se son su sus también una"},
    {"Portuguese",
        "ao as com como da das do dos em foi mais mas não o os para pela pelo por que seu sua são uma você é"},
    {"Latin",
        "ab ad atque autem cum enim esse est et ex hoc in nec non quae qui quod sed sunt ut vel"},
    {"Dutch",
        "aan bij dat de deze een en het kan maar met naar niet ook op van voor worden wordt zijn"},
};

#endif
