"""Words and sentences that off-topic text is made of; ``{}`` takes any word, ``{n}`` a number."""

__all__ = ["CODE", "FOREIGN", "INSTRUCTIONS", "OTHER_ENDINGS", "QUESTIONS", "SENTENCES", "SUMS", "WORDS"]

_WORDS_TEXT = """
ability account acid action actor age agent air amount animal answer apple argument army art article atom author baby
bag balance bank base battle beach beauty belief benefit bird blood board boat body book border boss box brain branch
bread bridge budget building bus business butter cake camera cancer capital car card care case cat cause cell century
chain chair chance charge child church circle citizen city class client climate clock cloud code coffee coin college
color committee company computer concept contract cook copy corn cost cotton council country course court cow cream
credit crime crop crowd culture cup customer dance danger data day death debt decision degree demand desert design
device diet dinner disease doctor dog dollar door dream dress drink driver duck earth economy egg election energy
engine error essay event evidence example expert eye fact factor factory family farmer fashion father fear field film
fire fish flight floor flower food football force forest friend fruit function future game garden gas gene gift girl
glass goal gold government grain group growth guest guitar hair hand harm health heart heat history hotel hour house
human husband ice idea image income industry insect island item jacket job journey judge juice key king kitchen knife
lake lamp language law lawyer leader leaf lemon lesson letter level library life lift light line list loss love
machine manager map market marriage match meal meaning medicine member memory metal method milk mind minute mirror
model money month moon morning mother motion mountain movie muscle music name nation nature network news night noise
north novel number nurse ocean office oil option order owner page pain paint paper parent park party patient peace
people period person phone piece plan planet plant player poem poet police policy poor population power pressure price
prize problem product profit program project protein question rain rate reader reason recipe record red rent report
result rice right ring risk river road robot rock role room rule sale salt school science sea season seat sentence
server shape sheep ship shirt shop signal silver sister skill sky sleep smell society soil soldier song sound space
speech speed spirit sport spring square stage star state station stock stone storm story street student subject sugar
summer sun switch system table task tax tea teacher team theory thing thought ticket time title tool topic town toy
trade train travel tree trip truck trust truth turn type uncle union unit valley value vehicle victim video view
village virus voice wage wall war water wave way weather week weight wheel wife wind window winter wire wolf woman
wood word work worker world writer year yellow zero zone Africa America Asia Berlin Brazil Canada China Egypt England
Europe France Germany India Italy Japan London Mexico Monday Paris Python Rome Russia Spain Sunday January Tom Eve Ann
able active angry bad basic big black blue bright calm central cheap clean clear cold common complex cool correct dark
deep different difficult digital dry early easy economic empty equal famous fast final fine foreign free fresh full
general global good great green happy hard heavy high honest hot huge important internal international kind large late
legal little local long loud low main major medical modern moral natural new nice normal old open original perfect
personal political popular possible private professional public quick quiet rare ready real rich round sad safe sharp
short significant simple single slow small social soft solid special standard strange strong sweet tall true typical
usual warm weak white wide wild wise wrong young accept add agree appear apply argue arrive ask avoid become begin
believe break bring build buy call carry change choose compare consider contain create decide define describe develop
discuss draw drive eat enter exist expect explain fail fall feel fight find follow forget give grow happen hear help
hold improve include increase know lead learn leave live lose make mean measure meet move need offer open pass pay
play prepare prevent produce protect prove provide publish pull push read reduce remain remember remove require return
run save say see seem sell send serve show sing sit solve speak spend stand start stay stop study suggest support swap
take talk teach tell test think translate travel treat try understand use visit wait walk want watch win wish wonder
write
"""
WORDS = tuple(_WORDS_TEXT.split())
QUESTIONS = (
    *("What is {}?", "What is the {} of a {}?", "Who is {}?", "Who was the first {} in {}?", "Where can I buy a {}?"),
    *("How do I {} a {}?", "How can I {} my {} without a {}?", "Why is the {} so {}?", "Why do some {}s {}?"),
    *("What are the main {}s of {} {}?", "Which {} is the best for {}?", "Which of the following is a {}?"),
    *("Can you help me with my {}?", "I think that {} is {}, what do you say?", "How many {}s are in a {}?"),
    *("Is it true that a {} can {}?", "What happens when a {} meets the {} of a {}?", "Do you know any {} {}?"),
    *("What would you do if a {} were {}?", "What's the difference between {} and {}?", "When did {} become {}?"),
    *("Could you {} this {} for me?", "Should I {} or {}?", "What time is it in {}?", "Are you a {}?", "How are you?"),
    *("Which {} did the {} choose, and why?", "What does the word {} mean?", "Does a {} {} more than a {}?"),
    *("What did the {} say about the {}?", "Who wrote {}?", "What color is the {}?", "How far is {} from {}?"),
    *("How much does a {} cost?", "How old is the {}?", "Can {}s {}?", "What comes after {}?", "What do you {}?"),
    *(
        "What day was it when the {} began?",
        "In which month do {}s {}?",
        "Which floor has the {}?",
        "Why?",
        "What now?",
    ),
    *("What is the sum of {n} and {n}?", "What is {n} times {n}?", "What is {n} plus {n}?", "Is {n} a prime number?"),
)
INSTRUCTIONS = (
    *("Write a poem about a {} and a {}.", "Translate {} into {}.", "Tell me about {}.", "Explain {} to a {}."),
    *("Write a {} essay on the {} of {}, with at least {n} words.", "Give me a list of {n} {}s for the {}."),
    *("Please {} the {} before {}.", "Summarize the following {} in {n} sentences.", "Act as a {} and {} my {}."),
    *("You are a {} {}. Your task is to {} the {}.", "Imagine you are a {} in {}.", "Describe a {} {} in detail."),
    *("Rewrite this {} so that it sounds {}.", "Create a {} plan for a {} with {n} {}s.", "Design a {} for {} {}s."),
    *("Compare {} with {} and say which is more {}.", "Suggest a name for a {}.", "Continue the story: {} {} {}"),
    *("Make a table of {}, {} and {}.", "Fix the errors in this {}.", "Find the {} of the {}.", "Name three {}s."),
    *(
        "Let's {} together.",
        "Hello {}!",
        "Hi",
        "Thanks, that was {}.",
        "Good morning, {}.",
        "OK, go on.",
        "Tell a joke.",
    ),
    *("Classify the {} as {} or {}.", "Extract every {} from the text below.", "Answer in {n} words or less."),
    *("Do not use the word {}.", "Start every sentence with {}.", "Your answer must contain {n} bullet points."),
    *("Complete the sentence: the {} is {} because", "Pretend that {} is {}.", "Solve for x: {n}x + {n} = {n}."),
    *("Go to the {}.", "Add {} to the {}.", "Turn the {} into a {}.", "Start with a {}.", "Switch the {} off."),
    *("Take {n} {}s and {} them.", "Count from {n} to {n}.", "Wait for the {}.", "Put the {} on the {}."),
)
SENTENCES = (
    *("The {} is {}.", "The {} of the {} was {} and {}.", "A {} {} can {} the {}.", "In {n}, the {} had {n} {}s."),
    *("Most {}s {} when the {} is {}.", "She said that her {} would {} the {}.", "He bought a {} for ${n}."),
    *("I have a {} and I want to {} it.", "We {} every {}.", "They could not {} because of the {}."),
    *("According to the {}, {} is a form of {}.", "The {} sued the {} for {}.", "It is {} to {} in public."),
    *("However, the {} may {} without {}.", "For example, a {} has more {} than a {}.", "This is called the {} {}."),
    *("A {n}-year-old {} comes to the {} with a {}.", "The first {} is {}; the second is {}.", "There are {n} {}s."),
    *("The {} that the {} chose was {}.", "My {} lives in {} with two {}s.", "No {} should {} a {}."),
    *("If the {} is {}, then the {} must be {}.", "Although {}, the {} did not {}.", "Therefore {} implies {}."),
    *("The robot is a {}.", "The lift is {}.", "The lamp needs a new {}.", "A coin is {}.", "Today is {}."),
    *("It was a {} {} in {}.", "Scientists {} that {} is linked to {}.", "The {} rate fell by {n}% in {n} years."),
    *("On {} the {} met a {} {}.", '"I {} you," said the {}.', "The {} (see {}) is {}, not {}.", "{}: {} {} {}."),
    *("Two {}s and a {} walk into a {}.", "The {} was built between {n} and {n}.", "{} and {} are {}s."),
)
SUMS = (
    "{} has {n} {}s and buys {n} more.",
    "A {} sells {n} {}s on Monday and half as many on Tuesday.",
    "Each {} costs ${n} and each {} costs ${n}.",
    "She gives {n} of them to her {}.",
    "He needs {n} minutes for every {}.",
    "The {} drives at {n} miles per hour for {n} hours.",
    "There are {n} {}s in the {}, twice as many as {}s.",
    "{n}% of the {}s are {}.",
    "The next day he takes away {n} {}s.",
    "A bag holds {n} {}s, of which {n} are red.",
)
OTHER_ENDINGS = (
    *("How many are left?", "How much money does she have?", "What is the total?", "How many {}s does {} have now?"),
    *("How many steps were taken?", "Who is there?", "Is it {}?", "What is the first digit?", "Is the number even?"),
    *("What was the first move?", "How far did it go?", "What color is it?", "Which one is bigger?", "Why?"),
    *("Where did it start?", "How long did it take?", "What is the product?", "Who turned it?", "Is that possible?"),
    *("What year is it?", "How many cups are there?", "What is under the other cups?", "Who lives on that floor?"),
    *(
        "How many floors are there?",
        "Which switch is it?",
        "What time is it?",
        "What comes next?",
        "What happens then?",
    ),
    *("How many days passed?", "Which season is it?", "What is behind the robot?", "Can you draw it?", "And then?"),
)
CODE = (
    "def {}({}, {}):\n    for i in range({n}):\n        if {} > i:\n            return {}\n    return None",
    '#include <stdio.h>\nint main() {{\n  int {} = {n};\n  printf("%d\\n", {});\n  return 0;\n}}',
    "SELECT {}, COUNT(*) FROM {}s WHERE {} > {n} GROUP BY {};",
    '<div class="{}">\n  <p>{} {}</p>\n  <a href="https://{}.com">{}</a>\n</div>',
    "import {}\n\nclass {}:\n    def __init__(self):\n        self.{} = [{n}, {n}, {n}]",
    "function {}({}) {{ return {}.map(x => x * {n}); }}",
    '{{"{}": "{}", "{}": [{n}, {n}], "{}": null}}',
    "git commit -m '{} {}' && cd ../{} && make {}",
    'Traceback (most recent call last):\n  File "{}.py", line {n}, in {}\nValueError: {} {}',
    "| {} | {} |\n|---|---|\n| {n} | {} |\n| {n} | {} |",
    "name,{},{}\n{},{n},{n}\n{},{n},{n}",
    "$x^2 + {n}x - {n} = 0$, \\frac{{{n}}}{{{n}}} \\le \\sqrt{{{n}}}",
    "f(x) = {n}x + {n}, g(x) = x/{n}; f(g({n})) = ?",
    "# {}\n\n## {} {}\n\n- **{}**: {} {}\n- **{}**: {}\n",
    "public static void {}(String[] {}) throws Exception {{ System.out.println({}); }}",
    "x = {n}\nwhile x < {n}:\n    x += {n}\nprint(x)",
    "User: {} {}?\nAssistant: {} {} {}.\nUser: {}",
    "1. {} {}\n2. {} {}\n3. {}\n4. {} {} {}",
)
FOREIGN = (
    *("¿Cuál es la capital de España?", "Escribe un cuento sobre un niño y un gato.", "No entiendo la pregunta."),
    *("Quelle heure est-il à Paris ?", "Écris une lettre à ma voisine.", "Le chat dort sur la chaise rouge."),
    *(
        "Wie heißt die Hauptstadt von Österreich?",
        "Schreib ein Gedicht über Schnee.",
        "Ich hätte gern zwei Äpfel.",
    ),
    *("Qual è il fiume più lungo d'Italia?", "Dammi una ricetta per la pizza.", "Oggi è lunedì e piove."),
    *("Qual é a maior cidade do Brasil?", "Preciso de ajuda com o meu trabalho.", "Obrigado, até amanhã!"),
    *("Hoe laat vertrekt de trein?", "Vertel me een grap.", "Hvad er klokken?", "Vad heter du?", "Missä on asema?"),
    *("Jaka jest dzisiaj pogoda?", "Napisz krótki wiersz o zimie.", "Kde je nádraží?", "Hol van a könyvtár?"),
    *("Какая сегодня погода?", "Напиши рассказ о море и о старом рыбаке.", "Сколько будет два плюс два?"),
    *("今天天气怎么样?", "请写一首关于春天的诗。", "中国的首都是哪里?", "我想学习编程,应该从哪里开始?"),
    *(
        "今日は何曜日ですか。",
        "短い物語を書いてください。",
        "東京の人口を教えて。",
        "오늘 날씨 어때요?",
        "시를 써 주세요.",
    ),
    *("ما هي عاصمة مصر؟", "اكتب قصة قصيرة عن القمر.", "आज मौसम कैसा है?", "एक कविता लिखो।", "מה השעה?"),
    *("Bugün hava nasıl?", "Bana bir hikâye anlat.", "Thời tiết hôm nay thế nào?", "Apa kabar?", "Unde este gara?"),
)
